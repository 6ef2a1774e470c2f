"""A reducer of one's own, one file and nothing else, wherever frames go: watched, asked, forked, saved, batched."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import statekv
from statekv.config import Config
from statekv.engine.session import Session
from statekv.errors import ConfigError, HorizonError, MemoryLimitError
from statekv.evals.cost import clip_tokens
from statekv.evals.runner import evaluate
from statekv.models.encoded import EncodedStep
from statekv.reduce.base import Memory, Reducer
from statekv.reduce.static import Static
from statekv.video.writer import write_video
from tests.engine.test_session_failures import NO_MEMORY, failing
from tests.evals.small import Small, videos_of, write_clips
from tests.presets import filled
from tests.reduce.methods import Everything, Rotating
from tests.talk import (
    QUESTION,
    assert_same_stream,
    frames_of,
    inputs_of,
    session_answer,
    shared_engine,
    some_frames,
    stock_model,
)
from tests.tiny import EVERY_MODEL, FAMILIES, TWO_FAMILIES, video

EVERY_KIND = pytest.mark.parametrize("family", EVERY_MODEL)
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
BOTH_STEPS = pytest.mark.parametrize("family", TWO_FAMILIES)  # one frame to a step, and two
PLACE = "tests.reduce.methods:Rotating(by=2)"


def opened(family: str, reduce: object = PLACE, **settings: Any) -> Session:
    return shared_engine(family).open(**filled(settings, budget=30, reduce=reduce))


def memories(session: Session) -> Mapping[str, Mapping[str, Any]]:
    return session.state.memories


def assert_same_memories(found: Session, expected: Session) -> None:
    a, b = memories(found)["reduce"], memories(expected)["reduce"]
    assert a.keys() == b.keys()
    assert a["count"] == b["count"]
    assert torch.equal(a["sum"], b["sum"])


def assert_same(found: Session, expected: Session) -> None:
    assert_same_stream(found, expected)
    assert_same_memories(found, expected)
    assert torch.equal(found.logits(QUESTION), expected.logits(QUESTION))


@EVERY_KIND
def test_the_object_and_its_spelling_do_the_same(family: str) -> None:
    spelled, given, whole = opened(family), opened(family, Rotating(2)), opened(family, None)
    for session in (spelled, given, whole):
        session.push(some_frames(8))
    assert_same(spelled, given)
    assert spelled.state.tokens < whole.state.tokens
    assert spelled.state.position == whole.state.position
    assert memories(spelled)["reduce"]["count"] == spelled.steps
    assert spelled.state.nbytes["memories"] == memories(spelled)["reduce"]["sum"].nbytes
    assert whole.state.nbytes["memories"] == 0


@EVERY_KIND
def test_that_leaves_out_nothing_changes_nothing(family: str) -> None:
    plain, reducing = opened(family, None), opened(family, Everything())
    for session in (plain, reducing):
        session.push(some_frames(7))
    assert_same_stream(reducing, plain)
    assert torch.equal(reducing.logits(QUESTION), plain.logits(QUESTION))


@EVERY_KIND
def test_a_question_changes_no_memory_also_where_frames_wait_for_it(family: str) -> None:
    asked, never = opened(family), opened(family)
    for number, frame in enumerate(some_frames(7)):
        for session in (asked, never):
            session.push([frame])
        asked.ask(QUESTION)
        asked.logits(QUESTION)
        if memories(never):
            assert_same_memories(asked, never)
        assert number == 6 or asked.frames == number + 1
    assert_same(asked, never)


class Noting(Rotating):
    """Says what it was shown."""

    seen: list[tuple[int, int]]

    def reduce(self, step: EncodedStep, memory: Memory) -> EncodedStep:
        self.seen.append((memory.get("count", 0), len(step.frames)))
        return super().reduce(step, memory)


def noting() -> Noting:
    found = Noting()
    object.__setattr__(found, "seen", [])
    return found


def test_frames_that_wait_are_reduced_as_the_stream_stands() -> None:
    reducer = noting()
    session = opened("qwen3_vl", reducer)
    session.push(some_frames(5))
    assert reducer.seen == [(0, 2), (1, 2)]
    session.logits(QUESTION)
    session.logits(QUESTION)
    assert reducer.seen[2:] == [(2, 1), (2, 1)]
    session.push(some_frames(1))
    assert reducer.seen[4:] == [(2, 2)]


@EVERY_FAMILY
def test_the_newest_frames_are_a_clip_whose_memory_begins_anew_at_each_question(family: str) -> None:
    """And its cost is counted from the tokens that go on."""
    reducer = noting()
    session = opened(family, reducer, method="last_frames", last_frames=4)
    session.push(some_frames(9))
    size = session.runner.model.frames_per_step
    expected = [(number, size) for number in range(4 // size)]
    session.logits(QUESTION)
    assert reducer.seen == expected
    session.logits(QUESTION)
    assert reducer.seen[len(expected) :] == expected
    assert not memories(session)
    plain = opened(family, None, method="last_frames", last_frames=4)
    plain.push(some_frames(9))
    assert sum(clip_tokens(session)) < sum(clip_tokens(plain))


@BOTH_STEPS
def test_forks_go_their_own_ways(family: str) -> None:
    frames = some_frames(12)
    one, other, alone = opened(family), opened(family), opened(family)
    one.push(frames[:6])
    fork = one.fork()
    assert_same_memories(fork, one)
    one.push(frames[6:])
    fork.push(frames[8:])
    other.push([*frames[:6], *frames[8:]])
    alone.push(frames)
    assert_same(fork, other)
    assert_same(one, alone)


@BOTH_STEPS
def test_saved_and_restored_it_goes_on_as_if_nothing_had_happened(family: str, tmp_path: Path) -> None:
    never, going = opened(family, Rotating(3)), opened(family, Rotating(3))
    never.push(some_frames(11))
    going.push(some_frames(11)[:7])
    going.save(tmp_path)
    restored = shared_engine(family).restore(tmp_path)
    assert restored.state.config.reduce == Rotating(3)
    assert_same(restored, going)
    for session in (going, restored):
        session.push(some_frames(11)[7:])
        assert_same(session, never)


def test_a_save_of_a_reducer_that_is_not_there_is_refused_unless_an_equal_one_is_given(tmp_path: Path) -> None:
    class Local(Rotating):
        pass

    engine, session = shared_engine("internvl"), opened("internvl", Local(3))
    session.push(some_frames(4))
    session.save(tmp_path)
    with pytest.raises(ConfigError, match=r"was watched with a reducer: .*Local\(by=3\).* reduce=…") as caught:
        engine.restore(tmp_path)
    assert "\n" not in str(caught.value)
    for wrong in (Local(2), Rotating(3), "static", None):
        with pytest.raises(ConfigError, match=r"was watched with reduce '.*Local\(by=3\)', not"):
            engine.restore(tmp_path, reduce=wrong)
    assert_same(engine.restore(tmp_path, reduce=Local(3)), session)


def test_a_save_without_a_reducer_does_not_get_one(tmp_path: Path) -> None:
    session = opened("internvl", None)
    session.push(some_frames(4))
    session.save(tmp_path)
    with pytest.raises(ConfigError, match=r"with reduce None, not 'static\(threshold=0.1\)'"):
        shared_engine("internvl").restore(tmp_path, reduce="static")


@EVERY_FAMILY
def test_a_step_that_fails_is_forgotten_by_the_reducer_too(family: str) -> None:
    session = opened(family)
    size = session.runner.model.frames_per_step
    session.push(some_frames(3 * size))
    before = memories(session)
    with (
        failing(session.runner.model.language_model.layers[1], MemoryError, NO_MEMORY),
        pytest.raises(MemoryLimitError),
    ):
        session.push(some_frames(size))
    assert memories(session) is before


@EVERY_FAMILY
def test_a_step_that_finds_no_room_is_forgotten_by_the_reducer_too(family: str) -> None:
    session = opened(family, horizon=120, on_horizon="error")
    with pytest.raises(HorizonError):
        session.push(some_frames(80))
    assert memories(session)["reduce"]["count"] == session.steps


@pytest.mark.parametrize("wrong", ["nothing", "too much"])
def test_a_step_that_the_reducer_spoils_leaves_the_stream_as_it_was(wrong: str) -> None:
    class Spoiling(Rotating):
        def reduce(self, step: EncodedStep, memory: Memory) -> EncodedStep:
            found = super().reduce(step, memory)
            if memory["count"] != 3:
                return found
            return found.keep(torch.tensor([], dtype=torch.int64)) if wrong == "nothing" else found.features  # type: ignore[return-value]

    session, plain = opened("qwen3_vl", Spoiling()), opened("qwen3_vl")
    plain.push(some_frames(5))
    with pytest.raises(ConfigError, match="reducer Spoiling"):
        session.push(some_frames(6))
    assert_same_stream(session, plain)
    assert_same_memories(session, plain)
    session.queue.check()


@BOTH_STEPS
def test_where_older_steps_are_moved_for_room_the_reducer_sees_each_step_once(family: str) -> None:
    reducer = noting()
    session = opened(family, reducer, horizon=200, on_horizon="compact", budget=20)
    session.push(some_frames(60))
    assert [count for count, _ in reducer.seen] == list(range(session.steps))
    assert session.state.compaction.factor > 1


@BOTH_STEPS
def test_sessions_that_step_together_remember_what_each_would_alone(family: str) -> None:
    """Reducers of the same effect in one batch, another one beside them: tokens decide who goes together."""
    engine, count = shared_engine(family), 8
    reducers: list[Reducer | None] = [Rotating(2), Rotating(2), Rotating(3), None, Static(0.5)]
    together = [engine.open(budget=20, reduce=reducer) for reducer in reducers]
    alone = [engine.open(budget=20, reduce=reducer) for reducer in reducers]
    for number, (session, other) in enumerate(zip(together, alone, strict=True)):
        session.source = iter(some_frames(count, seed=number))
        other.push(some_frames(count, seed=number))
    assert not engine.watch_all(together)
    for session, other in zip(together, alone, strict=True):
        assert session.state.spans == other.state.spans
        a, b = session.state.memories.get("reduce", {}), other.state.memories.get("reduce", {})
        assert a.keys() == b.keys()
        for name, value in a.items():
            torch.testing.assert_close(value, b[name], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(session.logits(QUESTION), other.logits(QUESTION), atol=1e-3, rtol=1e-3)


@EVERY_KIND
def test_generate_and_a_session_reduce_alike(family: str) -> None:
    made, pictures = stock_model(family), video(6)
    session = opened(family, budget=60)
    session.push(frames_of(pictures))
    expected = session_answer(session)
    settings: dict[str, Any] = {"budget": 60, "reduce": PLACE, "max_new_tokens": 6, "output_logits": True}
    inputs = inputs_of(made, pictures, QUESTION)
    out: Any = statekv.generate(shared_engine(family).model.model, **inputs, **settings, return_dict_in_generate=True)
    logits = torch.cat(out.logits)
    torch.testing.assert_close(logits, expected.logits, atol=1e-4, rtol=0)


def test_tiers_hold_what_goes_on(tmp_path: Path) -> None:
    """Steps of many lengths leave the device and come back."""
    capped, plain = (
        opened("internvl", budget=20, **caps) for caps in ({"memory": "760KiB", "host_memory": "1MiB"}, {})
    )
    for session in (capped, plain):
        session.push(some_frames(40))
    assert capped.state.nbytes["host"] > 0
    torch.testing.assert_close(capped.logits(QUESTION), plain.logits(QUESTION), atol=1e-4, rtol=1e-4)


def test_a_benchmark_counts_the_tokens_that_go_on(tmp_path: Path) -> None:
    configs = {"whole": Config(budget=30, fps=1.0), "half": Config(budget=30, fps=1.0, reduce=Rotating(2))}
    videos = videos_of(write_clips(tmp_path, 1))
    evaluate(shared_engine("internvl"), Small(videos), configs, tmp_path / "out", model="tiny")
    text = {name: (tmp_path / "out" / f"{name}.0-of-1.jsonl").read_text() for name in configs}
    assert '"reduce": "tests.reduce.methods:Rotating(by=2)"' in text["half"]
    tokens = {name: found.split('"tokens": ')[1].split(",")[0] for name, found in text.items()}
    assert int(tokens["half"]) < int(tokens["whole"])


def test_a_file_is_watched_in_batches_of_the_tower(tmp_path: Path) -> None:
    """The reducer works when a step's turn has come, however far the tower is ahead."""
    write_video(tmp_path / "clip.mp4", video(12), fps=1)
    one, many = (
        shared_engine("qwen3_vl").open(tmp_path / "clip.mp4", budget=30, reduce=PLACE, vision_batch=batch)
        for batch in (1, 4)
    )
    for session in (one, many):
        session.watch()
    assert one.state.spans == many.state.spans
    torch.testing.assert_close(many.logits(QUESTION), one.logits(QUESTION), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("reduce", "told"),
    [
        ("still", "unknown reduce 'still'.*known: static, package.module:Class"),
        ("static(0.1)", "cannot be read.*name\\(parameter=value\\)"),
        ("static(size=3)", "parameters: threshold"),
        ("static(threshold=3)", "threshold is 3, but must be a cosine distance"),
        ("tests.reduce.methods:Nothing", "tests.reduce.methods has no Nothing"),
        ("no_such.module:Nothing", "no module no_such"),
        ("statekv.config:Config(budget=9)", "which is no Reducer.*statekv.reduce.base.Reducer"),
        (Rotating, "is the class Rotating.*Rotating\\(…\\)"),
        (Config(), "must be a Reducer"),
    ],
)
def test_a_reducer_that_cannot_be_had_is_refused_in_one_line(reduce: object, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        shared_engine("internvl").open(reduce=reduce)
    assert "\n" not in str(caught.value)
