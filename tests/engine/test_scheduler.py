"""Rounds over several sessions: together where that can be, fair, and each one's trouble its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from statekv.cache.stream import StreamState
from statekv.engine.engine import Engine
from statekv.engine.progress import Progress
from statekv.engine.session import Session
from statekv.errors import ConfigError, HorizonError, MemoryLimitError, StateKVError, VideoError
from statekv.models.adapter import Segment
from statekv.models.encoded import EncodedStep
from statekv.runner.runner import ModelRunner
from statekv.video.frame import Frame
from statekv.video.source import FrameBuffer, Source
from tests.engine.test_session_failures import NO_MEMORY, failing
from tests.presets import filled
from tests.runner.test_runner import assert_close
from tests.talk import QUESTION, assert_same_stream, frames_of, shared_engine, some_frames
from tests.tiny import TWO_FAMILIES, video


class Camera(Source):
    """A live source whose frames come when the test says so, in no order of time."""

    live = True

    def __init__(self) -> None:
        self._newest = FrameBuffer(1000, 1000.0)

    def __next__(self) -> Frame:
        found = self._newest.get()
        if found is None:
            raise StopIteration
        return found[0]

    def ready(self, timeout_seconds: float) -> bool:
        return self._newest.ready(timeout_seconds)

    def show(self, frames: Sequence[Frame]) -> None:
        for frame in frames:
            self._newest.put(frame, 0.0)

    def close(self) -> None:
        self._newest.end()


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that are run."""
    sizes: list[int] = []
    run = ModelRunner.prefill_batch

    def counting(runner: ModelRunner, states: Sequence[StreamState], segments: Sequence[Segment]) -> object:
        sizes.append(len(states))
        return run(runner, states, segments)

    monkeypatch.setattr(ModelRunner, "prefill_batch", counting)
    return sizes


def watching(engine: Engine, frames: Sequence[Frame], **settings: Any) -> Session:
    session = engine.open(**filled(settings, budget=20, vision_batch=1))
    session.source = iter(frames)
    return session


def filming(engine: Engine, **settings: Any) -> tuple[Session, Camera]:
    session, camera = engine.open(**filled(settings, budget=20)), Camera()
    session.source = camera
    return session, camera


@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_all_are_watched_to_their_ends_as_if_alone(family: str, batches: list[int]) -> None:
    engine, seen = shared_engine(family), list[tuple[Session, Progress]]()
    films = [some_frames(frames, seed) for seed, frames in enumerate((8, 8, 5, 12))]
    sessions, alone = ([watching(engine, film) for film in films] for _ in range(2))
    failed = engine.watch_all(sessions, on_step=lambda session, progress: seen.append((session, progress)))
    assert failed == {}
    for session in alone:
        session.watch()
    assert max(batches) == 4
    for found, expected in zip(sessions, alone, strict=True):
        assert_close(found, expected)
        told = [progress for session, progress in seen if session is found]
        assert [progress.step for progress in told] == list(range(1, expected.steps + 1))
        assert told[-1].tokens == expected.state.tokens
        assert found.seconds.prefill > 0


def test_others_go_in_turn_and_equal_those_alone_to_the_bit(batches: list[int]) -> None:
    engine = shared_engine("internvl")
    ways: list[dict[str, Any]] = [
        {"budget": 20},
        {"budget": 30},
        {"carry": "recent"},
        {"method": "full"},
        {"method": "last_frames"},
        {"decay": 0.5},
    ]
    sessions, alone = ([watching(engine, some_frames(7, seed=1), **way) for way in ways] for _ in range(2))
    engine.watch_all(sessions)
    assert batches == []
    for found, expected in zip(sessions, alone, strict=True):
        expected.watch()
        assert_same_stream(found, expected)
        assert found.ask(QUESTION) == expected.ask(QUESTION)


def test_a_fast_source_does_not_keep_slow_ones_waiting() -> None:
    """Eight cameras of three geometries, one of which always has frames: nobody steps twice before all have stepped."""
    engine, order = shared_engine("internvl"), list[Session]()
    rounds = engine.scheduler(on_step=lambda session, _: order.append(session))
    pairs = [filming(engine, budget=budget) for budget in (20, 20, 30, 20, 30, 40, 20, 40)]
    for session, _ in pairs:
        rounds.add(session)
    fast, cameras = pairs[0][0], [camera for _, camera in pairs]
    cameras[0].show(some_frames(200))
    for number in range(12):
        slow = [pairs[1 + (number + shift) % 7] for shift in range(0, 7, 1 + number % 3)]
        for _, camera in slow:
            camera.show(some_frames(1, seed=number))
        order.clear()
        rounds.step()
        assert sorted(map(id, order)) == sorted(map(id, [fast, *(session for session, _ in slow)]))
    assert fast.steps == 12


def test_the_longest_waiting_batch_goes_first() -> None:
    engine, order = shared_engine("internvl"), list[int]()
    sessions = [filming(engine, budget=budget) for budget in (20, 30, 40)]
    numbers = {session: number for number, (session, _) in enumerate(sessions)}
    rounds = engine.scheduler(on_step=lambda session, _: order.append(numbers[session]))
    for session, _ in sessions:
        rounds.add(session)
    for shown in ((0, 1), (0,), (0, 1, 2)):
        for number in shown:
            sessions[number][1].show(some_frames(1))
        rounds.step()
    assert order == [0, 1, 0, 2, 1, 0]


def test_a_camera_without_frames_keeps_nobody_waiting() -> None:
    engine = shared_engine("internvl")
    (silent, _), (seeing, camera) = filming(engine), filming(engine)
    rounds = engine.scheduler()
    for session in (silent, seeing):
        rounds.add(session)
    camera.show(some_frames(3))
    assert [rounds.step() for _ in range(4)] == [1, 1, 1, 0]
    assert (silent.steps, seeing.steps, len(rounds)) == (0, 3, 2)


def test_sessions_come_and_go() -> None:
    engine = shared_engine("internvl")
    ended: list[tuple[Session, Exception | None]] = []
    rounds = engine.scheduler(on_end=lambda session, error: ended.append((session, error)))
    one, two, three = (watching(engine, some_frames(frames)) for frames in (2, 6, 6))
    rounds.add(one)
    rounds.add(one)
    rounds.step()
    rounds.add(two)
    rounds.step()
    rounds.step()
    assert ended == [(one, None)]
    rounds.add(three)
    rounds.step()
    three.close()
    rounds.remove(one)
    rounds.watch()
    assert ended[1:] == [(three, None), (two, None)]
    assert (one.steps, two.steps, len(rounds)) == (2, 6, 0)


def test_what_does_not_belong_here_is_refused() -> None:
    engine = shared_engine("internvl")
    with pytest.raises(ConfigError, match="no source"):
        engine.watch_all([engine.open()])
    with pytest.raises(ConfigError, match="another engine"):
        engine.watch_all([watching(shared_engine("qwen3_vl"), [])])
    twice = watching(engine, some_frames(3))
    with pytest.raises(ConfigError, match="named twice"):
        engine.watch_all([twice, twice])
    assert twice.frames == 0


# Trouble


def test_a_source_that_breaks_ends_one_session_alone() -> None:
    def broken() -> Iterator[Frame]:
        yield from some_frames(3)
        raise VideoError("cut off")

    engine = shared_engine("internvl")
    sessions = [watching(engine, some_frames(6)), watching(engine, list(some_frames(6)))]
    sessions[1].source = broken()
    failed = engine.watch_all(sessions)
    assert {session: str(error) for session, error in failed.items()} == {sessions[1]: "cut off"}
    assert [session.steps for session in sessions] == [6, 3]
    assert sessions[1].ask(QUESTION)


@pytest.mark.parametrize("family", TWO_FAMILIES)
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize(
    ("error", "seen_as"), [(ZeroDivisionError, ZeroDivisionError), (RuntimeError, MemoryLimitError)]
)
def test_a_batch_that_fails_leaves_its_members_as_a_failed_step_does(
    family: str, layer: int, error: type[Exception], seen_as: type[Exception], batches: list[int]
) -> None:
    engine = shared_engine(family)
    per_step = engine.model.frames_per_step
    cameras = [filming(engine) for _ in range(3)]
    rounds, ended = engine.scheduler(on_end=lambda _, error: ended.append(type(error))), list[Any]()
    for number, (session, camera) in enumerate(cameras):
        rounds.add(session)
        camera.show(some_frames(4 * per_step, seed=number))
    for _ in range(4):
        rounds.step()
    before = [(session.frames, session.ask(QUESTION), session.logits(QUESTION)) for session, _ in cameras]
    for _, camera in cameras:
        camera.show(some_frames(per_step, seed=9))
    batches.clear()
    with failing(engine.model.language_model.layers[layer].mlp, error, NO_MEMORY):
        rounds.step()
    assert (batches, ended, len(rounds)) == ([3], [seen_as] * 3, 0)
    for (session, _), (frames, answer, logits) in zip(cameras, before, strict=True):
        assert (session.frames, session.ask(QUESTION)) == (frames, answer)
        assert (session.logits(QUESTION) == logits).all()
        with pytest.raises(StateKVError, match="a step failed"):
            session.push(some_frames(per_step))


def test_a_stream_at_its_horizon_leaves_a_batch_that_goes_on(batches: list[int]) -> None:
    engine = shared_engine("qwen3_vl")
    short = watching(engine, some_frames(40), horizon=200, on_horizon="error")
    others = [watching(engine, some_frames(40, seed)) for seed in (1, 2)]
    failed = engine.watch_all([others[0], short, others[1]])
    assert [(session, type(error).__name__) for session, error in failed.items()] == [(short, "HorizonError")]
    assert {2, 3} <= set(batches)
    assert [session.steps for session in others] == [20, 20]
    assert 0 < short.steps < 20
    assert short.ask(QUESTION)
    with pytest.raises(HorizonError):
        short.push(some_frames(2))  # intact, as after a push that was refused


def test_a_size_that_changes_within_a_step_troubles_nobody() -> None:
    engine = shared_engine("qwen3_vl")
    pictures = [*frames_of(video(3)), *frames_of(video(2, height=64, width=64), start_seconds=3)]
    odd, alone, fine = watching(engine, pictures), watching(engine, pictures), watching(engine, some_frames(6))
    assert not engine.watch_all([odd, fine])
    assert (odd.steps, fine.steps) == (3, 3)
    alone.watch()
    assert odd.state.spans == alone.state.spans


@pytest.mark.parametrize(("settings", "meanwhile"), [({}, 2), ({"memory": "1MiB"}, 1)], ids=["free", "capped"])
def test_a_session_that_is_being_asked_goes_on_unless_memory_has_a_cap(
    settings: dict[str, Any], meanwhile: int
) -> None:
    engine = shared_engine("internvl")
    one, other = (watching(engine, some_frames(4, seed), **settings) for seed in (0, 1))
    rounds = engine.scheduler()
    for session in (one, other):
        rounds.add(session)
    rounds.step()
    answer = one.stream(QUESTION)
    next(answer)
    rounds.step()
    assert (one.steps, other.steps) == (meanwhile, 2)
    list(answer)
    rounds.watch()
    assert (one.steps, other.steps) == (4, 4)


def test_a_session_whose_turn_is_taken_steps_later() -> None:
    engine = shared_engine("internvl")
    one, other = (watching(engine, some_frames(4, seed)) for seed in (0, 1))
    rounds = engine.scheduler()
    for session in (one, other):
        rounds.add(session)
    holding, done = threading.Event(), threading.Event()

    def hold() -> None:
        with other.lock:
            holding.set()
            done.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    holding.wait(10)
    rounds.step()
    assert (one.steps, other.steps) == (1, 0)
    done.set()
    thread.join()
    rounds.watch()
    assert (one.steps, other.steps) == (4, 4)


def test_callbacks_may_ask_and_close() -> None:
    engine = shared_engine("internvl")
    sessions = [watching(engine, some_frames(5, seed)) for seed in range(3)]
    answers: list[str] = []

    def on_step(session: Session, progress: Progress) -> None:
        answers.append(session.ask(QUESTION, max_new_tokens=1))
        if session is sessions[1] and progress.step == 2:
            session.close()

    assert engine.watch_all(sessions, on_step) == {}
    assert len(answers) == 5 + 2 + 5


def test_pausing_and_going_on() -> None:
    engine = shared_engine("internvl")
    sessions = [watching(engine, some_frames(5, seed)) for seed in range(2)]
    engine.watch_all(sessions, pause=lambda: sessions[0].steps == 3)
    assert [session.steps for session in sessions] == [3, 3]
    engine.watch_all(sessions)
    assert [session.steps for session in sessions] == [5, 5]


def test_without_room_for_a_block_they_go_in_turn(monkeypatch: pytest.MonkeyPatch, batches: list[int]) -> None:
    monkeypatch.setattr(ModelRunner, "gather_batch", lambda *_: False)
    engine = shared_engine("internvl")
    sessions, alone = ([watching(engine, some_frames(6, seed)) for seed in range(2)] for _ in range(2))
    engine.watch_all(sessions)
    assert batches == []
    for found, expected in zip(sessions, alone, strict=True):
        expected.watch()
        assert_same_stream(found, expected)


@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_cameras_that_step_together_are_looked_at_together(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = shared_engine(family)
    per_step, model, looks = engine.model.frames_per_step, engine.model, list[int]()
    real = model.encode

    def look(steps: Sequence[Sequence[Frame]], frames_expected: int | None = None) -> list[EncodedStep]:
        looks.append(len(steps))
        return real(steps, frames_expected)

    monkeypatch.setattr(model, "encode", look)
    ways: list[dict[str, Any]] = [{}, {}, {"budget": 30}, {}]
    cameras, rounds = [filming(engine, **way) for way in ways], engine.scheduler()
    for number, (session, camera) in enumerate(cameras):
        rounds.add(session)
        camera.show(some_frames(6 * per_step, seed=number))
    for _ in range(6):
        rounds.step()
    assert looks[:4] == [1] * 4  # first steps go alone
    assert looks[4:] == [3, 1] * 5
    for number, (session, _) in enumerate(cameras):
        alone = engine.open(**{"budget": 20, **ways[number]})
        alone.push(some_frames(6 * per_step, seed=number))
        if number == 2:
            assert_same_stream(session, alone)
        else:
            assert_close(session, alone)


def test_a_picture_that_cannot_be_looked_at_troubles_its_own_session_alone() -> None:
    engine = shared_engine("qwen3_vl")
    cameras, ended = [filming(engine) for _ in range(3)], list[Any]()
    rounds = engine.scheduler(on_end=lambda session, error: ended.append((session, type(error).__name__)))
    for session, camera in cameras:
        rounds.add(session)
        camera.show(some_frames(4))
    rounds.step()
    rounds.step()
    for number, (_, camera) in enumerate(cameras):
        camera.show(frames_of(video(2, height=2, width=900)) if number == 1 else some_frames(2))
    rounds.step()
    assert ended == [(cameras[1][0], "VideoError")]
    assert [session.steps for session, _ in cameras] == [3, 2, 3]


def test_where_pictures_cannot_be_looked_at_together_each_session_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = ModelRunner.encode

    def refuse(runner: ModelRunner, steps: Sequence[Sequence[Frame]], expected: int | None) -> object:
        if len(steps) > 1:
            raise MemoryLimitError("out of memory")
        return encode(runner, steps, expected)

    engine = shared_engine("internvl")
    cameras, alone, rounds = (
        [filming(engine) for _ in range(2)],
        [engine.open(budget=20) for _ in range(2)],
        engine.scheduler(),
    )
    monkeypatch.setattr(ModelRunner, "encode", refuse)
    for number, (session, camera) in enumerate(cameras):
        rounds.add(session)
        camera.show(some_frames(4, seed=number))
        alone[number].push(some_frames(4, seed=number))
    assert [rounds.step() for _ in range(4)] == [2] * 4
    for (session, _), expected in zip(cameras, alone, strict=True):
        assert_close(session, expected)
