"""Streams past their horizon: keys stand where they would have been computed, and all else goes on as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from statekv.cache.archive import load_stream, save_stream
from statekv.cache.carried import CarriedCache
from statekv.cache.compaction import Compaction
from statekv.cache.detailed import DetailedCache
from statekv.engine.session import Session
from statekv.errors import HorizonError
from statekv.models.adapter import Segment, VideoModel
from statekv.ops.rope import rotate
from statekv.runner.runner import ModelRunner
from tests.presets import chosen, filled, preset
from tests.talk import (
    QUESTION,
    assert_same_answer,
    assert_same_memory,
    assert_same_stream,
    frames_of,
    memory,
    session_answer,
    shared_engine,
    some_frames,
)
from tests.tiny import FAMILIES, video

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
SHORT = 160  # positions
LONG = 48  # frames: far more than fit
SETTINGS = {
    **chosen("attention", "all", "streaming_llm"),
    "pinned": preset("pinned", budget=60, decay=0.5),
    "retrieve": preset("retrieve", retrieve=3, retrieve_carried=True),
}
# Both memories with every family, the others with one whose positions have one axis and one whose have three.
EVERY_SETTING = pytest.mark.parametrize(
    ("family", "name"),
    [
        *((family, name) for family in FAMILIES for name in ("attention", "retrieve")),
        *(("internvl", name) for name in ("all", "streaming_llm", "pinned")),
        ("qwen2_5_vl", "pinned"),
    ],
)
BOTH_MEMORIES = pytest.mark.parametrize(
    ("family", "name"), list(zip(FAMILIES, ("pinned", "retrieve", "retrieve", "pinned"), strict=True))
)


def pictures(family: str, frames: int = LONG) -> list[Any]:
    """Steps of Qwen2.5-VL stand where their time is; there the clock runs faster than the frames come."""
    return frames_of(video(frames), fps=2.0 if family == "qwen2_5_vl" else 1.0)


def opened(family: str, horizon: int = SHORT, **settings: Any) -> Session:
    return shared_engine(family).open(**filled(settings, budget=40, horizon=horizon, max_new_tokens=6))


class Unrotated(ModelRunner):
    """Remembers the keys of every step as they were before rotation, and where they were rotated to."""

    def __init__(self, model: VideoModel) -> None:
        super().__init__(model)
        self.keys: list[torch.Tensor] = []  # per segment [layers, kv_heads, T, D]
        self.positions: list[torch.Tensor] = []  # per segment [T] or [3, T]
        self.places: list[int] = []

    def prefill(self, state: Any, segment: Segment, *rest: Any, **more: Any) -> torch.Tensor:
        place = (state.position if segment.moment is None else segment.moment) + state.compaction.gained
        hidden = super().prefill(state, segment, *rest, **more)
        cos, sin = self.model.rope.angles(segment.positions, state.horizon)
        held = torch.cat(
            [state.detailed.keys(layer)[..., -segment.length :, :] for layer in range(len(state.detailed))]
        )
        self.keys.append(rotate(held.double(), cos.double(), -sin.double()))
        self.positions.append(segment.positions[..., 0, :])
        self.places.append(place)
        return hidden


def rotated_anew(seen: Unrotated, session: Session) -> torch.Tensor:
    """[layers, kv_heads, tokens, D]: every key, rotated once to where its step stands now."""
    model, state, found = seen.model, session.state, []
    for raw, positions, place in zip(seen.keys, seen.positions, seen.places, strict=True):
        began = int(positions.flatten()[0])
        by = state.compaction.place(place) - began
        axes = torch.tensor([by]) if positions.ndim == 1 else torch.tensor([by, *2 * [0 if model.own_time else by]])
        there = (positions + axes[:, None]).unsqueeze(-2) if positions.ndim > 1 else (positions + axes)[None]
        cos, sin = model.rope.angles(there, state.horizon)
        found.append(rotate(raw, cos.double(), sin.double()))
    return torch.cat(found, dim=-2)


@EVERY_SETTING
def test_keys_stand_where_they_would_have_been_computed(family: str, name: str) -> None:
    """In both memories: turned further is the same as turned once, from the key as it was before any rotation."""
    session = opened(family, **SETTINGS[name])
    session.runner = seen = Unrotated(session.runner.model)
    session.push(pictures(family))
    state = session.state
    assert state.compaction.factor >= 4
    expected = rotated_anew(seen, session)
    held = torch.cat([state.detailed.keys(layer) for layer in range(len(state.detailed))]).double()
    numbers = [number for number in range(state.tokens) if number not in state.detailed.dropped]
    torch.testing.assert_close(held, expected[:, :, numbers], atol=2e-5, rtol=2e-5)
    if isinstance(state.carried, DetailedCache):
        return
    for layer, length in enumerate(state.carried.lengths):
        token_ids = state.carried.token_ids[layer][0, :, :length].long()  # [kv_heads, length]
        carried = state.carried.buffers[layer][0, 0, :, :length].double()
        there = expected[layer].gather(1, token_ids.unsqueeze(-1).expand_as(carried))
        torch.testing.assert_close(carried, there, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("family", ["internvl", "qwen2_5_vl"])
def test_a_stream_goes_on_without_end(family: str) -> None:
    """The same by default where nobody knows the length; positions stay below the horizon, questions their room."""
    session, told = opened(family), opened(family, on_horizon="compact")
    room = session.state.horizon - session.state.room
    for frame in pictures(family):
        session.push([frame])
        assert session.state.position <= room
    told.push(pictures(family))
    assert_same_stream(session, told)
    assert session.frames == LONG
    assert session.ask(QUESTION) == told.ask(QUESTION)


@EVERY_FAMILY
def test_a_stream_that_never_reaches_its_horizon_is_untouched(family: str) -> None:
    compact, error = opened(family, horizon=4000), opened(family, horizon=4000, on_horizon="error")
    for session in (compact, error):
        session.push(some_frames(12))
    assert compact.state.compaction == Compaction()
    assert_same_stream(compact, error)
    assert torch.equal(compact.logits(QUESTION), error.logits(QUESTION))


@EVERY_SETTING
def test_compacting_with_nothing_to_move_changes_no_bit(family: str, name: str) -> None:
    session = opened(family, **SETTINGS[name])
    session.push(pictures(family, 24))
    state = session.state
    before, position, blocks = memory(session), state.position, state.blocks and list(state.blocks.spots)
    state.compact(state.compaction)
    assert_same_memory(memory(session), before)
    assert (state.position, state.blocks and state.blocks.spots) == (position, blocks)


@BOTH_MEMORIES
def test_questions_change_nothing(family: str, name: str) -> None:
    """Asked around every compaction, also with a frame of Qwen-VL that waits for its partner."""
    asked, silent = opened(family, **SETTINGS[name]), opened(family, **SETTINGS[name])
    for frame in pictures(family, 30):
        asked.push([frame])
        asked.ask(QUESTION, max_new_tokens=2)
        silent.push([frame])
    assert asked.state.compaction.factor > 1
    assert_same_stream(asked, silent)
    assert_same_answer(session_answer(asked), session_answer(silent))


@BOTH_MEMORIES
def test_saved_streams_keep_it(family: str, name: str, tmp_path: Path) -> None:
    going, frames = opened(family, **SETTINGS[name]), pictures(family, 48)
    going.push(frames[:24])
    assert going.state.compaction.factor > 1
    save_stream(going.state, tmp_path / "saved")
    loaded = Session(going.runner, load_stream(tmp_path / "saved", going.state.spec, rotary=going.runner.model))
    for session in (going, loaded):
        session.push(frames[24:])
    assert loaded.state.compaction == going.state.compaction
    assert_same_stream(loaded, going)
    assert torch.equal(loaded.logits(QUESTION), going.logits(QUESTION))


@EVERY_FAMILY
def test_addresses_stay(family: str) -> None:
    """Recorded steps go on: keys are rotated in place."""
    session = opened(family)
    session.push(pictures(family, 24))
    state = session.state
    state.detailed.reserve(5000)
    addresses, factor = _addresses(session), state.compaction.factor
    session.push(pictures(family)[24:])
    assert state.compaction.factor > factor
    assert _addresses(session) == addresses


def _addresses(session: Session) -> list[int]:
    assert isinstance(session.state.carried, CarriedCache)
    return [buffer.data_ptr() for buffer in (*session.state.carried.buffers, *session.state.detailed.buffers)]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen2_5_vl"])
def test_a_range_that_holds_no_step_is_refused_and_loses_nothing(family: str) -> None:
    """In one line; what was seen can be asked, and the stream is where it was.

    A step of Qwen2.5-VL takes a single position, for which there is always room.
    """
    session, frames = opened(family), pictures(family, 6)
    one = session.runner.model.frames_per_step
    session.push(frames[:one])
    state, before, answer = session.state, memory(session), session.ask(QUESTION)
    reach, state.horizon = state.horizon, state.position + state.room  # no room for another step
    with pytest.raises(HorizonError, match=f"a horizon of {state.horizon}.*would need") as told:
        session.push(frames[one : 2 * one])
    assert "\n" not in str(told.value)
    assert "horizon above" in told.value.hint
    state.horizon = reach
    assert_same_memory(memory(session), before)
    session.queue.waiting.clear()  # a frame of Qwen-VL still waits for its partner
    assert session.ask(QUESTION) == answer
    session.push(frames[one:])
    assert session.frames == 6


def test_roundings_do_not_pile_up() -> None:
    """A bfloat16 key that moves through a stream of 50 times its range stays as near as a few roundings allow."""
    rope = shared_engine("internvl").model.rope
    raw = torch.randn(1, 200, 16, generator=torch.Generator().manual_seed(0))
    compaction, position, token_ids, moves = Compaction(), 0, 900, 0
    held = rotate(raw, *rope.angles(torch.tensor([[token_ids]]), 2000)).bfloat16()
    while position < 50 * 2000:
        if compaction.place(position) + 9 > 2000:
            before, compaction = compaction, compaction.next(position, 0, 2000)
            by = compaction.place(token_ids) - before.place(token_ids)
            if by and position > token_ids:
                held, moves = rotate(held.float(), *rope.angles(torch.tensor([[by]]), 2000)).bfloat16(), moves + 1
        position += 9
    exact = rotate(raw, *rope.angles(torch.tensor([[compaction.place(token_ids)]]), 2000))
    once = (exact.bfloat16() - exact).norm() / exact.norm()
    assert 4 < moves <= 10
    assert (held - exact).norm() / exact.norm() < (1 + moves) ** 0.5 * 1.2 * once


def test_reindexed_steps_close_up_by_what_they_take_now() -> None:
    """Blocks know their spacing: what they take together is where the next step stands."""
    session = opened("internvl", recall="retrieve", retrieve=3, retrieve_positions="reindex")
    session.push(pictures("internvl"))
    state = session.state
    assert state.blocks is not None
    steps = [span for span in state.spans if span.kind == "step"]
    assert sum(spot.positions for spot in state.blocks.spots) == state.position - steps[0].position
    assert state.blocks.spots[0].positions < steps[0].length
    assert state.blocks.spots[-1].positions == steps[-1].length
    assert session.ask(QUESTION, max_new_tokens=2)


def test_a_long_silence_of_a_clock_is_bridged() -> None:
    """Qwen2.5-VL counts time beside its text: an hour without frames is longer than the whole range."""
    session = opened("qwen2_5_vl")
    session.push(pictures("qwen2_5_vl", 8))
    text = session.state.position
    session.push(frames_of(video(8), start_seconds=3600.0))
    assert session.state.position == text
    assert session.state.compaction.factor > 100
    assert session.ask(QUESTION)
