"""A stream behind a gate is that of the frames it lets through, however they come and wherever it is interrupted."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from statekv.engine.engine import load
from statekv.engine.generate import generate
from statekv.engine.session import Session
from statekv.errors import ConfigError
from statekv.video import Frame, FrameGate, PushedSource
from tests.talk import QUESTION, assert_same_stream, inputs_of, shared_engine, some_frames, stock_model
from tests.tiny import video
from tests.video.fixtures.gates import EveryNth, Nothing

BOTH = pytest.mark.parametrize("family", ["internvl", "qwen3_vl"])
SPELLED = "tests.video.fixtures.gates:EveryNth(n=2)"


def opened(family: str, source: Iterable[Frame] | None = None, gate: object = SPELLED, **settings: Any) -> Session:
    return shared_engine(family).open(source, **{"budget": 20, "gate": gate, **settings})


def expected(family: str, frames: list[Frame]) -> Session:
    session = opened(family, gate=None)
    session.push(frames)
    return session


def handed_over(frames: list[Frame]) -> PushedSource:
    source = PushedSource(depth=len(frames), max_lag_seconds=60)
    for frame in frames:
        source.put(frame)
    source.end()
    return source


def assert_same(found: Session, other: Session) -> None:
    assert_same_stream(found, other)
    a, b = found.state.memories["gate"], other.state.memories["gate"]
    assert a["count"] == b["count"]
    assert torch.equal(a["sum"], b["sum"])


@BOTH
def test_only_what_it_lets_through_enters(family: str) -> None:
    frames = some_frames(13)
    plain = expected(family, frames[::2])
    pushed, watched, live = opened(family), opened(family, frames, vision_batch=1), opened(family, handed_over(frames))
    pushed.push(frames)
    watched.watch()
    live.watch()
    for session in (pushed, watched, live):
        assert_same_stream(session, plain)
        assert session.state.memories["gate"]["count"] == 13
        assert session.ask(QUESTION) == plain.ask(QUESTION)


@BOTH
def test_several_streams_have_gates_of_their_own(family: str) -> None:
    films = [some_frames(9, seed) for seed in range(3)]
    gates = [SPELLED, EveryNth(3), None]
    sessions = [opened(family, film, gate, vision_batch=1) for film, gate in zip(films, gates, strict=True)]
    assert shared_engine(family).watch_all(sessions) == {}
    assert [session.frames for session in sessions] == [5, 3, 9]
    assert sessions[1].state.spans == expected(family, films[1][::3]).state.spans


@BOTH
def test_forks_and_saves_go_on_where_the_gate_was(family: str, tmp_path: Path) -> None:
    """Also where frames have been read, and judged, before their turn."""
    frames = some_frames(22)
    whole, going = opened(family, frames, vision_batch=6), opened(family, iter(frames), vision_batch=6)
    whole.watch()
    going.watch(pause=lambda: going.frames >= 3)
    assert going.queue.ahead.held[0]
    going.save(tmp_path)
    fork, rest = going.fork(), frames[going.state.memories["gate"]["count"] :]
    with pytest.raises(ConfigError, match=r"was watched with gate .*n=2.*, not .*n=3"):
        shared_engine(family).restore(tmp_path, gate=EveryNth(3))
    restored = shared_engine(family).restore(tmp_path, gate=EveryNth(2))
    for session in (fork, restored):
        session.source = rest
    for session in (going, fork, restored):
        session.watch()
        assert session.frames == 11
        assert_same(session, whole)


@BOTH
def test_a_question_changes_nothing(family: str) -> None:
    asked, never = opened(family), opened(family)
    for frame in some_frames(7):
        for session in (asked, never):
            session.push([frame])
        asked.ask(QUESTION)
    assert_same(asked, never)


def test_of_the_newest_frames_too_only_those_are_seen() -> None:
    frames = some_frames(12)
    gated, plain = (opened("internvl", gate=gate, method="last_frames", budget=4096) for gate in (SPELLED, None))
    gated.push(frames)
    plain.push(frames[::2])
    assert gated.frames == plain.frames == 6
    assert torch.equal(gated.logits(QUESTION), plain.logits(QUESTION))


def test_where_it_lets_nothing_through_a_source_still_ends_and_may_be_interrupted() -> None:
    asked = 0

    def pause() -> bool:
        nonlocal asked
        asked += 1
        return asked > 4

    for source in (handed_over(some_frames(20)), iter(some_frames(20))):
        session, asked = opened("internvl", source, Nothing()), 0
        session.watch(pause=pause)
        assert asked == 5
        session.watch()
        assert session.frames == session.steps == 0
        with pytest.raises(ConfigError, match="nothing has been seen yet"):
            session.ask(QUESTION)
    again = opened("internvl", some_frames(5), Nothing())
    assert shared_engine("internvl").watch_all([again]) == {}


class Broken(FrameGate):
    def __init__(self, how: str) -> None:
        self.how = how

    def admit(self, frame: Frame, memory: dict[str, Any]) -> bool:
        if self.how == "remembers a set":
            memory["seen"] = {1}
        return None if self.how == "says nothing" else True  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("how", "told"),
    [("says nothing", "gate Broken returned None"), ("remembers a set", "gate Broken remembers 'seen' as a set")],
)
def test_what_is_no_gate_is_told_and_the_stream_stays_as_it_was(how: str, told: str) -> None:
    session = opened("internvl", gate=Broken(how))
    with pytest.raises(ConfigError, match=told):
        session.push(some_frames(1))
    assert (session.frames, session.state.memories) == (0, {})
    session.source = some_frames(2)
    with pytest.raises(ConfigError, match=told):
        session.watch()


def test_what_cannot_be_a_gate_is_refused() -> None:
    with pytest.raises(ConfigError, match="a text was pushed"):
        opened("internvl").push(["frame"])  # type: ignore[list-item]
    for gate, told in [
        ("movement", "unknown `?gate`? 'movement'"),
        ("nowhere:Gate", "gate.*nowhere"),
        ("tests.video.fixtures.gates:Frame", "which is no FrameGate"),
        (EveryNth, "is the class EveryNth"),
        ("tests.video.fixtures.gates:EveryNth(m=2)", "parameters: n"),
    ]:
        with pytest.raises(ConfigError, match=told):
            opened("internvl", gate=gate)
    with pytest.raises(ConfigError, match="nowhere"):
        load("no-such-model", gate="nowhere:Gate")
    made = stock_model("internvl")
    with pytest.raises(ConfigError, match=r"gate is .* with a processor's outputs"):
        generate(made.model, gate=SPELLED, **inputs_of(made, video(4), QUESTION))
