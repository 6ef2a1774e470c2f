"""Streams do not touch each other, and questions do not touch streams: bit for bit."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from statekv.errors import StateKVError
from tests.presets import chosen, preset
from tests.talk import (
    QUESTION,
    assert_same_memory,
    assert_same_stream,
    frames_of,
    memory,
    session_answer,
    shared_engine,
    some_frames,
)
from tests.tiny import TWO_FAMILIES, video

SETTINGS = chosen("attention", "roomy", "pinned", "all", "random", "streaming_llm", budget=20)
WAYS = ("close", "forget", "throw")  # to abandon an answer
EVERY_FAMILY = pytest.mark.parametrize("family", TWO_FAMILIES)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *(("internvl", settings) for settings in SETTINGS.values()),
        *(("qwen3_vl", SETTINGS[name]) for name in ("attention", "all")),
    ],
    ids=str,
)
def test_interleaved_sessions_equal_separate_ones(family: str, settings: dict[str, Any]) -> None:
    engine = shared_engine(family)
    frames, others = some_frames(5), frames_of(video(5, height=64, width=48, seed=9), fps=3.0, start_seconds=50)
    alone, other_alone = engine.open(**settings), engine.open(**settings)
    alone.push(frames)
    other_alone.push(others)
    one, other = engine.open(**settings), engine.open(**settings)
    for index, frame in enumerate(frames):
        one.push([frame])
        one.ask(QUESTION, max_new_tokens=2)
        other.push(others[index : index + 1])
    assert_same_stream(one, alone)
    assert_same_stream(other, other_alone)
    assert one.ask(QUESTION) == alone.ask(QUESTION)


@EVERY_FAMILY
def test_a_streamed_answer_is_not_disturbed_by_another_session(family: str) -> None:
    engine = shared_engine(family)
    one, other = engine.open(budget=20), engine.open(budget=20)
    one.push(some_frames(6))
    expected = one.ask(QUESTION)
    pieces = []
    for piece in one.stream(QUESTION):
        pieces.append(piece)
        other.push(some_frames(2))
        other.ask(QUESTION, max_new_tokens=2)
    assert "".join(pieces) == expected


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *(("qwen3_vl", settings) for settings in SETTINGS.values()),
        *(("internvl", SETTINGS[name]) for name in ("attention", "all")),
    ],
    ids=str,
)
def test_asking_and_going_on_equals_never_having_asked(family: str, settings: dict[str, Any]) -> None:
    """Asked after every frame: for Qwen every other question finds a frame that still waits for its partner."""
    engine, frames = shared_engine(family), some_frames(7)
    asked, silent = engine.open(**settings), engine.open(**settings)
    for frame in frames:
        asked.push([frame])
        asked.ask(QUESTION, max_new_tokens=3)
        asked.logits(QUESTION)
        silent.push([frame])
        assert_same_stream(asked, silent)


@pytest.mark.parametrize(
    ("family", "frames", "settings"),
    [
        *(("internvl", 5, settings) for settings in SETTINGS.values()),
        *(("qwen3_vl", 5, settings) for settings in SETTINGS.values()),
        *(("qwen3_vl", frames, SETTINGS[name]) for frames in (1, 6) for name in ("attention", "all")),
    ],
    ids=str,
)
def test_asking_twice_gives_the_same_answer(family: str, frames: int, settings: dict[str, Any]) -> None:
    session = shared_engine(family).open(**settings)
    session.push(some_frames(frames))
    first = session_answer(session)
    session.ask("How many people are there?")
    second = session_answer(session)
    assert first.tokens == second.tokens
    assert_same_memory([first.logits], [second.logits])


@pytest.mark.parametrize(
    ("family", "name", "way"),
    [
        *((family, "attention", way) for family in TWO_FAMILIES for way in WAYS),
        *(("internvl", name, WAYS[at % len(WAYS)]) for at, name in enumerate(SETTINGS) if name != "attention"),
    ],
)
def test_an_abandoned_answer_leaves_the_stream_as_it_was(family: str, name: str, way: str) -> None:
    session, silent = (shared_engine(family).open(**SETTINGS[name]) for _ in range(2))
    for stream in (session, silent):
        stream.push(some_frames(5))
    answer: Any = session.stream(QUESTION)
    next(answer)
    next(answer)
    if way == "close":
        answer.close()
    elif way == "throw":
        with pytest.raises(KeyboardInterrupt):
            answer.throw(KeyboardInterrupt)
    elif way == "forget":
        del answer
        gc.collect()
    assert_same_stream(session, silent)
    for stream in (session, silent):
        stream.push(some_frames(2, seed=8))
    assert_same_stream(session, silent)
    assert session.ask(QUESTION) == silent.ask(QUESTION)


@EVERY_FAMILY
def test_a_question_that_fails_leaves_the_stream_as_it_was(family: str) -> None:
    session, silent = shared_engine(family).open(budget=20), shared_engine(family).open(budget=20)
    for stream in (session, silent):
        stream.push(some_frames(5))
    hook = session.runner.model.language_model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    try:
        for fails in (session.ask, session.logits):
            with pytest.raises(ZeroDivisionError):
                fails(QUESTION)
    finally:
        hook.remove()
    assert_same_stream(session, silent)
    session.push(some_frames(2))
    silent.push(some_frames(2))
    assert_same_stream(session, silent)


MEANWHILE = {
    **chosen("attention", "all", "recent", "streaming_llm", "retrieve", "rekv", "last_frames", budget=20),
    "retrieve carried": preset("retrieve", retrieve_carried=True, budget=20),
    "compact": {"on_horizon": "compact", "horizon": 180, "budget": 20},
}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *(("internvl", settings) for settings in MEANWHILE.values()),
        *(("qwen3_vl", MEANWHILE[name]) for name in ("attention", "retrieve", "last_frames")),
    ],
    ids=str,
)
def test_what_enters_while_an_answer_is_given_does_not_change_it(family: str, settings: dict[str, Any]) -> None:
    """Frames, another question, another answer, a fork: for Qwen a frame was waiting when it was asked."""
    engine, frames = shared_engine(family), some_frames(14)
    session, silent = engine.open(max_new_tokens=12, **settings), engine.open(max_new_tokens=12, **settings)
    session.push(frames[:5])
    silent.push(frames)
    expected, answer = session.ask(QUESTION), session.stream(QUESTION)
    pieces = [next(answer)]
    session.push(frames[5:6])
    second, early = session.ask(QUESTION), session.stream(QUESTION)
    opened = [next(early)]
    fork = session.fork()
    for frame in frames[6:]:
        session.push([frame])
        session.ask("How many people are there?", max_new_tokens=2)
        pieces.append(next(answer, ""))
    fork.push(frames[6:8])
    assert "".join([*pieces, *answer]) == expected
    assert "".join([*opened, *early]) == second
    assert_same_stream(session, silent)
    assert session.ask(QUESTION) == silent.ask(QUESTION)


def test_nothing_is_copied_of_a_stream_that_goes_on_while_it_answers() -> None:
    """Nor does the answer read anything but its own tokens twice."""
    session, frames = shared_engine("internvl").open(budget=20), some_frames(8)
    session.push(frames[:4])
    session.state.detailed.reserve(2000)
    places, answer = session.state.detailed.addresses, session.stream(QUESTION)
    next(answer)
    session.push(frames[4:])
    list(answer)
    assert session.state.detailed.addresses == places


CAPPED: dict[str, Any] = {"memory": "1MiB", "budget": 20}


@EVERY_FAMILY
def test_under_a_cap_nothing_enters_and_nothing_else_is_asked_while_an_answer_is_given(family: str) -> None:
    session, silent = shared_engine(family).open(**CAPPED), shared_engine(family).open(**CAPPED)
    for stream in (session, silent):
        stream.push(some_frames(5))
    expected = silent.ask(QUESTION)
    answer = session.stream(QUESTION)
    pieces = [next(answer)]
    for refused in (
        lambda: session.push(some_frames(1)),
        lambda: session.ask(QUESTION),
        lambda: session.logits(QUESTION),
    ):
        with pytest.raises(StateKVError, match="still being given"):
            refused()
    assert "".join([*pieces, *answer]) == expected
    assert_same_stream(session, silent)
    session.push(some_frames(1))
    silent.push(some_frames(1))
    assert_same_stream(session, silent)


@EVERY_FAMILY
def test_watching_while_an_answer_is_given_loses_no_frame(family: str) -> None:
    engine = shared_engine(family)
    session, silent = engine.open(**CAPPED), engine.open(**CAPPED)
    for stream in (session, silent):
        stream.source = iter(some_frames(8))
        stream.watch(until_seconds=3)
    answer = session.stream(QUESTION)
    next(answer)
    with pytest.raises(StateKVError, match="still being given"):
        session.watch()
    list(answer)
    session.watch()
    silent.watch()
    assert_same_stream(session, silent)


def test_a_peek_at_a_waiting_frame_changes_the_answer_but_not_the_stream() -> None:
    session, without = shared_engine("qwen3_vl").open(budget=20), shared_engine("qwen3_vl").open(budget=20)
    for stream in (session, without):
        stream.push(some_frames(4))
    session.push(some_frames(1, seed=4))
    before = memory(session)
    assert_same_memory(before, memory(without))
    assert (session.frames, session.state.frames) == (5, 4)
    assert session.ask(QUESTION) != without.ask(QUESTION)
    assert_same_memory(memory(session), before)
