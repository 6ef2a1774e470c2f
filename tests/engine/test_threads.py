"""Many threads on one engine: everybody gets what they would have got alone."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from statekv.engine.engine import Engine
from statekv.engine.progress import Progress
from statekv.engine.session import Session
from statekv.errors import ConfigError
from tests.engine.test_scheduler import watching
from tests.presets import chosen
from tests.runner.test_runner import assert_close
from tests.talk import (
    QUESTION,
    assert_same_memory,
    assert_same_stream,
    frames_of,
    memory,
    shared_engine,
    some_frames,
)
from tests.tiny import video

CAPPED: dict[str, Any] = {"memory": "1MiB", "budget": 20}
SETTINGS = [
    *chosen(
        *("attention", "random", "retrieve", "pinned", "all", "last_frames", "decay", "streaming_llm"), budget=20
    ).values()
]


@pytest.fixture(autouse=True)
def _threads_change_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


def at_once(*works: Callable[[], Any]) -> list[Any]:
    """What each returns, all begun together; their errors are raised."""
    gate = threading.Barrier(len(works))

    def run(work: Callable[[], Any]) -> Any:
        gate.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return [done.result(timeout=120) for done in [pool.submit(run, work) for work in works]]


def life(engine: Engine, number: int) -> list[Any]:
    """Pushes, questions, answers given up, forks and closes, as the number says; what all of it came to."""
    drawn, seen = Random(number), list[Any]()
    ways = {"horizon": 5000 + 1000 * number, **SETTINGS[number % len(SETTINGS)]}
    sessions = [engine.open(**ways)]  # another horizon: other rotary frequencies, set on the one model
    for _ in range(16):
        session = drawn.choice(sessions)
        action = drawn.choice(["push", "push", "push", "ask", "stream", "fork", "close"])
        if action == "push":
            pictures = video(drawn.randint(1, 4), seed=drawn.randint(0, 5))
            session.push(frames_of(pictures, start_seconds=session.frames))
        elif action == "fork" and len(sessions) < 4:
            sessions.append(session.fork())
        elif action == "close" and len(sessions) > 1:
            sessions.remove(session)
            session.close()
        elif session.frames:
            answer = session.stream(QUESTION, max_new_tokens=4)
            seen.append([next(answer)] if action == "stream" else list(answer))
            answer.close()  # type: ignore[attr-defined]
    for session in sessions:
        seen += [session.ask(QUESTION, max_new_tokens=3) if session.frames else "", memory(session)]
        session.close()
    return seen


def assert_same_life(found: list[Any], expected: list[Any]) -> None:
    """To the bit."""
    for a, b in zip(found, expected, strict=True):
        if isinstance(b, list) and b and isinstance(b[0], torch.Tensor):
            assert_same_memory(a, b)
        else:
            assert a == b


@pytest.mark.parametrize(("family", "threads"), [("internvl", len(SETTINGS)), ("qwen3_vl", 4)])
def test_lives_at_once_equal_those_one_after_another(family: str, threads: int) -> None:
    engine = shared_engine(family)
    alone = [life(engine, number) for number in range(threads)]
    found = at_once(*(lambda number=number: life(engine, number) for number in range(threads)))  # type: ignore[misc]
    for mine, expected in zip(found, alone, strict=True):
        assert_same_life(mine, expected)


def test_one_session_pushed_asked_and_forked_by_different_threads() -> None:
    engine, frames = shared_engine("qwen3_vl"), some_frames(24)
    shared, silent = engine.open(budget=20), engine.open(budget=20)
    shared.push(frames[:2])
    silent.push(frames)

    def push() -> None:
        for frame in frames[2:]:
            shared.push([frame])

    def ask() -> list[str]:
        return [shared.ask(QUESTION, max_new_tokens=3) for _ in range(6)]

    def fork() -> list[tuple[int, str]]:
        found = []
        for _ in range(4):
            with shared.fork() as what_if:
                found.append((what_if.frames, what_if.ask(QUESTION, max_new_tokens=3)))
        return found

    _, answers, forks = at_once(push, ask, fork)
    assert_same_stream(shared, silent)
    assert len(answers) == 6
    counted = engine.open(budget=20)
    known = {}
    for number, frame in enumerate(frames, start=1):
        counted.push([frame])
        known[number] = counted.ask(QUESTION, max_new_tokens=3)
    assert all(known[seen] == answer for seen, answer in forks)
    assert set(answers) <= set(known.values())


@pytest.mark.parametrize("other", ["watch", "push", "ask", "save", "fork"])
def test_an_answer_that_another_thread_gives_is_waited_for_under_a_cap(other: str, tmp_path: Path) -> None:
    engine, begun, waited = shared_engine("internvl"), threading.Event(), threading.Event()
    session, alone = (engine.open(iter(some_frames(8)), **CAPPED) for _ in range(2))
    for each in (session, alone):
        each.watch(until_seconds=1)
    works: dict[str, Callable[[Session], Any]] = {
        "watch": Session.watch,
        "push": lambda session: session.push(some_frames(2)),
        "ask": lambda session: session.ask(QUESTION),
        "save": lambda session: session.save(tmp_path / "kept"),
        "fork": lambda session: session.fork().frames,
    }
    expected = alone.ask(QUESTION), works[other](alone)

    def answer() -> str:
        pieces = session.stream(QUESTION)
        text = next(pieces)
        begun.set()
        assert not waited.wait(0.2)
        return text + "".join(pieces)

    def work() -> Any:
        begun.wait()
        found = works[other](session)
        waited.set()
        return found

    assert tuple(at_once(answer, work)) == expected
    assert_same_stream(session, alone)


def test_who_waits_for_an_answer_may_change_their_mind() -> None:
    session = watching(shared_engine("internvl"), some_frames(8), memory="1MiB")
    session.watch(until_seconds=1)
    pieces, before = session.stream(QUESTION), session.frames
    next(pieces)
    at_once(lambda: session.watch(pause=lambda: True))
    assert session.frames == before
    pieces.close()


def test_an_event_loop_does_not_wait_for_its_own_answer() -> None:
    watched = shared_engine("internvl").open(**CAPPED)
    watched.push(some_frames(8))

    async def push() -> None:
        async with aclosing(watched.astream(QUESTION)) as pieces:
            async for _ in pieces:
                watched.push(some_frames(1))

    with pytest.raises(ConfigError, match="still being given"):
        asyncio.run(push())


def test_rounds_run_while_others_ask_open_and_close() -> None:
    """The watched streams differ from those alone by rounding; what is asked elsewhere does not differ at all."""
    engine = shared_engine("internvl")
    watched, alone = ([watching(engine, some_frames(12, seed)) for seed in range(4)] for _ in range(2))
    for session in alone:
        session.watch()
    expected = [life(engine, number) for number in (0, 1)]

    def ask() -> None:
        for number in range(12):
            session = watched[number % 4]
            if session.frames:
                session.ask(QUESTION, max_new_tokens=2)

    failed, *found = at_once(lambda: engine.watch_all(watched), lambda: life(engine, 0), lambda: life(engine, 1), ask)
    assert failed == {}
    for mine, other in zip(watched, alone, strict=True):
        assert_close(mine, other)
    for lived, before in zip(found[:2], expected, strict=True):
        assert_same_life(lived, before)


def test_frames_enter_while_answers_are_given() -> None:
    """As fast as either goes: each answer is the one of the moment at which it was asked."""
    engine, frames = shared_engine("qwen3_vl"), some_frames(20)
    session, silent, counted = (engine.open(budget=20) for _ in range(3))
    session.push(frames[:2])
    silent.push(frames)
    known = set[str]()
    for frame in frames:
        counted.push([frame])
        known.add(counted.ask(QUESTION, max_new_tokens=8))

    def push() -> None:
        for frame in frames[2:]:
            session.push([frame])

    def ask() -> list[str]:
        return [session.ask(QUESTION, max_new_tokens=8) for _ in range(6)]

    _, first, second = at_once(push, ask, ask)
    assert {*first, *second} <= known
    assert_same_stream(session, silent)


def test_a_slow_reader_of_an_answer_stops_nobody() -> None:
    engine = shared_engine("internvl")
    asked, other, alone = (engine.open(budget=20) for _ in range(3))
    for session in (asked, other, alone):
        session.push(some_frames(4))
    expected = alone.ask(QUESTION)
    answer = asked.stream(QUESTION)
    pieces = [next(answer)]
    at_once(lambda: other.push(some_frames(6)), lambda: other.ask(QUESTION))  # while the answer stands still
    assert other.frames == 10
    assert "".join([*pieces, *answer]) == expected


def test_a_question_is_not_starved_by_a_stream_that_never_rests() -> None:
    """It waits for one step, not for the end of the stream."""
    engine = shared_engine("internvl")
    busy, asked = engine.open(budget=20), engine.open(budget=20)
    asked.push(some_frames(2))
    tokens, stop = 4, threading.Event()
    seen: list[int] = []

    def step() -> None:
        while not stop.is_set() and busy.steps < 2000:
            busy.push(some_frames(1))

    def ask() -> None:
        while not busy.steps:
            pass
        before = busy.steps
        asked.ask(QUESTION, max_new_tokens=tokens)
        seen.append(busy.steps - before)
        stop.set()

    at_once(step, ask)
    assert seen[0] <= 4 * (tokens + 3)  # vision and language model: two turns a step


def test_closing_from_another_thread_ends_an_answer_with_an_error() -> None:
    engine = shared_engine("internvl")
    session = engine.open(budget=20)
    session.push(some_frames(4))
    answer = session.stream(QUESTION)
    next(answer)
    at_once(session.close)
    with pytest.raises(ConfigError, match="closed"):
        list(answer)
    assert sum(session.state.nbytes.values()) == 0
    with pytest.raises(ConfigError, match="closed"):
        session.push(some_frames(1))


def test_closing_while_another_thread_watches_ends_its_watch() -> None:
    engine = shared_engine("internvl")
    session: Session = watching(engine, some_frames(500))

    def watch() -> str:
        with pytest.raises(ConfigError, match="closed") as found:
            session.watch()
        return str(found.value)

    def close() -> None:
        while session.steps < 3:
            pass
        session.close()

    at_once(watch, close)
    assert sum(session.state.nbytes.values()) == 0


# In an event loop


def fresh() -> Session:
    return shared_engine("internvl").open(iter(some_frames(8)), budget=20, max_new_tokens=6)


@pytest.fixture
def watched() -> Session:
    found = fresh()
    found.watch()
    return found


def test_they_do_what_their_twins_do(watched: Session) -> None:
    async def twins() -> tuple[Session, str, list[str]]:
        found = fresh()
        await found.awatch()
        async with aclosing(found.astream(QUESTION)) as pieces:
            return found, await found.aask(QUESTION), [piece async for piece in pieces]

    found, text, pieces = asyncio.run(twins())
    assert_same_stream(found, watched)
    assert text == watched.ask(QUESTION) == "".join(pieces)
    assert len(pieces) > 1


def test_the_loop_is_free_meanwhile() -> None:
    """A step waits for something that the loop does only then."""

    async def both() -> None:
        found, done = fresh(), threading.Event()
        asyncio.get_running_loop().call_later(0.01, done.set)
        await found.awatch(on_step=lambda _: None if done.wait(20) else pytest.fail("the loop is held"))

    asyncio.run(both())


def test_a_cancelled_answer_ends_and_the_stream_goes_on(watched: Session) -> None:
    async def cancel() -> None:
        begun = asyncio.Event()

        async def answer() -> None:
            async with aclosing(watched.astream(QUESTION, max_new_tokens=10_000)) as pieces:
                async for _ in pieces:
                    begun.set()

        task = asyncio.create_task(answer())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    expected = watched.ask(QUESTION)
    asyncio.run(cancel())
    assert not watched.answering
    assert watched.ask(QUESTION) == expected


def test_a_cancelled_watch_stops_behind_a_step_and_can_be_gone_on_with(watched: Session) -> None:
    async def cancel() -> Session:
        found, loop, begun = fresh(), asyncio.get_running_loop(), asyncio.Event()

        def on_step(_: Progress) -> None:
            loop.call_soon_threadsafe(begun.set)

        task = asyncio.create_task(found.awatch(on_step=on_step, pause=lambda: found.frames > 4))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return found

    found = asyncio.run(cancel())
    assert 0 < found.steps < watched.steps
    found.watch()
    assert_same_stream(found, watched)


def test_in_the_middle_of_an_answer_other_tasks_wait_and_its_own_is_told(watched: Session) -> None:
    async def both() -> str:
        async with aclosing(watched.astream(QUESTION)) as pieces:
            await anext(pieces)
            with pytest.raises(ConfigError, match="in the middle of an answer"):
                await watched.aask(QUESTION)
            other = asyncio.create_task(watched.aask(QUESTION))
            async for _ in pieces:
                assert not other.done()
        return await other

    expected = watched.ask(QUESTION)
    assert asyncio.run(both()) == expected


def test_errors_are_those_of_the_twins(watched: Session) -> None:
    with pytest.raises(ConfigError, match="empty"):
        asyncio.run(watched.aask(" "))
    with pytest.raises(ConfigError, match="no source"):
        asyncio.run(shared_engine("internvl").open().awatch())
