"""Reading and looking ahead changes when things happen, never what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from statekv.config import Config
from statekv.engine.ingest import PendingStep, VisionPrefetch
from statekv.engine.progress import Seconds
from statekv.engine.session import Session
from statekv.errors import ConfigError, VideoError
from statekv.models.encoded import EncodedStep
from statekv.video.frame import Frame
from statekv.video.source import IteratorSource
from tests.talk import QUESTION, assert_same_stream, frames_of, shared_engine, some_frames
from tests.tiny import TWO_FAMILIES, video

EVERY_FAMILY = pytest.mark.parametrize("family", TWO_FAMILIES)


def watched(family: str, frames: int, vision_batch: int) -> Session:
    session = shared_engine(family).open(budget=20, vision_batch=vision_batch)
    session.source = iter(some_frames(frames))
    session.watch()
    return session


@EVERY_FAMILY
@pytest.mark.parametrize("vision_batch", [2, 3, 50])
def test_batches_change_no_more_than_rounding(family: str, vision_batch: int) -> None:
    one, many = watched(family, 15, 1), watched(family, 15, vision_batch)
    assert many.frames == one.frames == 15
    assert many.state.spans == one.state.spans
    for layer in range(one.state.spec.layers):
        found, expected = many.state.detailed.keys(layer), one.state.detailed.keys(layer)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@EVERY_FAMILY
def test_pictures_pass_the_vision_tower_once_and_by_the_batch(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shared_engine(family).model
    looked: list[int] = []
    look = model.encode

    def counted(steps: Sequence[Sequence[Frame]], frames_expected: int | None = None) -> list[EncodedStep]:
        looked.append(len(steps))
        return look(steps, frames_expected)

    monkeypatch.setattr(model, "encode", counted)
    per_step = model.frames_per_step
    watched(family, 11 * per_step, 4)
    assert looked == [1, 4, 4, 2]


@EVERY_FAMILY
def test_the_first_step_does_not_wait_for_a_batch(family: str) -> None:
    session = shared_engine(family).open(budget=20, vision_batch=4)
    drawn: list[float] = []

    def source() -> Iterator[Frame]:
        for frame in some_frames(20):
            drawn.append(frame.pts_seconds)
            yield frame

    session.source = source()
    steps: list[int] = []
    session.watch(on_step=lambda _: steps.append(len(drawn)))
    per_step = session.runner.model.frames_per_step
    assert steps[:2] == [per_step, 5 * per_step]


@EVERY_FAMILY
def test_frames_pushed_in_between_come_in_between(family: str) -> None:
    mixed, plain = (shared_engine(family).open(budget=20) for _ in range(2))
    frames, other = some_frames(12), some_frames(1, seed=9)[0]
    mixed.source = iter(frames)
    mixed.watch(until_seconds=3)
    mixed.push([other])
    mixed.watch()
    plain.push([*frames[:4], other, *frames[4:]])
    assert mixed.frames == plain.frames == 13
    for layer in range(plain.state.spec.layers):
        found, expected = mixed.state.detailed.keys(layer), plain.state.detailed.keys(layer)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@EVERY_FAMILY
def test_an_error_of_the_source_comes_behind_the_frames_before_it(family: str) -> None:
    def source() -> Iterator[Frame]:
        yield from some_frames(7)
        raise VideoError("the file ends in the middle of a packet")

    session = shared_engine(family).open(budget=20)
    session.source = source()
    with pytest.raises(VideoError, match="middle of a packet"):
        session.watch()
    assert session.frames == 7
    session.watch()
    assert session.frames == 7


def test_time_is_noted_where_it_was_spent() -> None:
    engine, seconds = shared_engine("internvl"), Seconds()
    state = engine.runner.open(Config())
    ahead = VisionPrefetch(engine.runner, state, seconds)
    frame = ahead.draw(IteratorSource(some_frames(3)), [])
    assert frame is not None
    assert seconds.decode > 0 < seconds.vision
    spent = seconds.vision
    ahead.take([frame])
    assert seconds.vision == spent


@EVERY_FAMILY
def test_what_another_stream_has_had_looked_at_is_taken(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = shared_engine(family)
    size = engine.model.frames_per_step
    frames = some_frames(3 * size)
    steps = [frames[i : i + size] for i in range(0, len(frames), size)]
    alone, offered = (engine.open(budget=20) for _ in range(2))
    alone.push(frames)
    seen = [engine.model.encode([step])[0] for step in steps]
    monkeypatch.setattr(engine.model, "encode", lambda *_: pytest.fail("looked again"))
    for step, found in zip(steps, seen, strict=True):
        offered.push(step, seen=found)
    assert_same_stream(offered, alone)


def test_of_other_frames_it_is_not_taken() -> None:
    engine, frames = shared_engine("internvl"), some_frames(2)
    (wrong,) = engine.model.encode([[frames[1]]])
    alone, offered = (engine.open(budget=20) for _ in range(2))
    alone.push(frames[:1])
    offered.push(frames[:1], seen=wrong)
    assert_same_stream(offered, alone)


def test_frames_let_go_are_gone() -> None:
    engine = shared_engine("internvl")
    ahead = VisionPrefetch(engine.runner, engine.runner.open(Config()), Seconds())
    source = IteratorSource(some_frames(3))
    ahead.draw(source, [])
    ahead.forget()
    assert ahead.draw(source, []) is not None
    assert ahead.draw(source, []) is not None
    assert ahead.draw(source, []) is None


@pytest.mark.parametrize("settings", [{}, {"method": "last_frames", "last_frames": 3}], ids=["steps", "newest"])
@pytest.mark.parametrize("drawn", [False, True])
def test_pixels_that_are_overwritten_were_seen_before(settings: dict[str, Any], drawn: bool) -> None:
    engine, frames = shared_engine("qwen3_vl"), some_frames(5)
    buffer = frames[0].data.clone()

    def reused() -> Iterator[Frame]:
        for frame in frames:
            buffer.copy_(frame.data)
            yield replace(frame, data=buffer)

    expected, found = engine.open(**settings), engine.open(**settings)
    expected.push(frames)
    if drawn:
        found.source = reused()
        found.watch()
    else:
        found.push(reused())
    buffer.zero_()
    assert torch.equal(found.logits(QUESTION), expected.logits(QUESTION))


@pytest.mark.parametrize("drawn", [False, True])
def test_a_frame_of_another_size_begins_a_step(drawn: bool) -> None:
    engine = shared_engine("qwen3_vl")
    small, large = some_frames(3), frames_of(video(3, height=96, width=64), start_seconds=3)
    by_hand, found = engine.open(), engine.open()
    by_hand.push(small[:2])
    short = PendingStep(by_hand.runner, by_hand.state, by_hand.queue.ahead, small[2:])
    by_hand.queue.take(short)
    by_hand.push(large)
    if drawn:
        found.source = iter([*small, *large])
        found.watch()
    else:
        found.push([*small, *large])
    assert (found.frames, found.steps) == (6, 3)
    assert_same_stream(found, by_hand)
    assert torch.equal(found.logits(QUESTION), by_hand.logits(QUESTION))


@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_frames_from_before_the_first_are_refused(family: str) -> None:
    session = shared_engine(family).open()
    session.push(frames_of(video(3), start_seconds=5))
    before = session.logits(QUESTION)
    with pytest.raises(ConfigError, match=r"a frame of 1 s comes before the stream's first, of 5 s"):
        session.push(frames_of(video(1), start_seconds=1))
    assert torch.equal(session.logits(QUESTION), before)
