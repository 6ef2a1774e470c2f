"""Streams that never end: tokens are numbered on, and what is kept of them stays as much as it was."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from statekv.cache.stream import StreamState
from statekv.config import Config
from statekv.models.adapter import Segment
from tests.cache.test_carried import carried, random_scores
from tests.cache.test_stream import Unturned, nothing_turns
from tests.cache.tokens import kv_spec

FAR = 2**31 - 60  # tokens


@pytest.mark.parametrize("carry", ["attention", "recent", "sink_recent"])
def test_a_stream_goes_on_beyond_int32(carry: str) -> None:
    """What is kept does not depend on how many tokens have come before; sinks and a pinned prefix stay for ever."""
    far, near = (carried(20, carry, pinned=2) for _ in range(2))
    for number in range(30):
        if number == 4:  # a few billion tokens pass
            far.detailed.away += FAR
        fresh = torch.randn(3, 2, 1, 2, 5, 4, generator=torch.Generator().manual_seed(number))
        for cache in (far, near):
            cache.pin_from(cache.detailed.length + 3)
            cache.open_slots(5)
            for layer in range(3):
                cache.update(*fresh[layer], layer)
                cache.evict(layer, random_scores(cache, layer, number))
        for layer in range(3):
            tokens = near.kept(layer)
            assert torch.equal(far.kept(layer), tokens.long() + FAR * (tokens >= 20))
            mine, its = (cache.buffers[layer][..., : cache.lengths[layer], :] for cache in (far, near))
            assert torch.equal(mine, its)
    assert far.detailed.length > 2**31
    assert {ids.dtype for ids in near.token_ids} == {torch.int32}
    assert torch.equal(far.fork(far.detailed).kept(1), far.kept(1))


class Still(Unturned):
    """As a model, for keys that have moved."""

    def moved(self, by: torch.Tensor, horizon: int) -> tuple[torch.Tensor, torch.Tensor]:
        return nothing_turns(by[None])


@dataclass
class Growth:
    """What a stream takes at some moment."""

    nbytes: int
    spans: int
    objects: int


def growth(state: StreamState) -> Growth:
    gc.collect()
    return Growth(sum(state.nbytes.values()), len(state.spans), len(gc.get_objects()))


@torch.inference_mode()
def watch(state: StreamState, steps: int, first: int = 0) -> None:
    """Tiny steps as a runner lets them in, every seventh of them after a gap."""
    g, tokens = state.spec, 2
    generator = torch.Generator().manual_seed(first)
    for number in range(first, first + steps):
        segment = step_at(state, tokens, float(number))
        if state.close_up(segment):
            segment = step_at(state, tokens, float(number))
        state.expect(segment)
        if number % 7 == 6:
            state.note("gap", 0, number - 0.5, state.uncompacted(None))
        view = state.begin(segment)
        for layer in range(g.layers):
            key, value = torch.randn(2, 1, g.kv_heads, tokens, g.head_dim, generator=generator)
            seen, _ = view.update(key, value, layer)
            if view.must_evict(0):
                view.evict(layer, torch.rand(seen.shape[:3], generator=generator))
        state.commit(segment)


def step_at(state: StreamState, tokens: int, pts_seconds: float) -> Segment:
    positions = torch.arange(state.position, state.position + tokens)[None]
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    return Segment("step", ids, ids, positions, state.position + tokens, 1, pts_seconds)


ENDLESS: dict[str, dict[str, Any]] = {
    "streaming_llm": {"method": "streaming_llm"},
    "streaming_llm, capped": {"method": "streaming_llm", "memory": "150KiB"},
    "recent": {"recall": "recent", "pin_newest": 1},
    "sample, recent": {"carry": "random", "recall": "recent", "memory": "150KiB"},
    "capped": {"memory": "150KiB"},
    "capped, retrieve": {"memory": "150KiB", "recall": "retrieve", "retrieve": 2, "host_memory": "20KiB"},
}


@pytest.mark.parametrize("settings", ENDLESS.values(), ids=ENDLESS)
def test_thousands_of_tiny_steps_leave_no_more_behind_than_hundreds(settings: dict[str, Any]) -> None:
    config = Config.of(**{"budget": 16, "max_new_tokens": 2, **settings})
    state = StreamState(kv_spec(layers=1, kv_heads=1), config, horizon=800, compacts=True, rotary=Still())
    watch(state, 500)
    before = growth(state)
    watch(state, 1500, first=500)
    after = growth(state)
    assert state.tokens == 4000
    assert state.frames == 2000
    assert after.nbytes <= before.nbytes
    assert after.spans <= 1.1 * before.spans + 20
    assert after.objects <= before.objects + 100
    gaps = {span.start for span in state.spans if span.kind == "gap"}
    assert gaps <= {span.start for span in state.spans if span.kind == "step"}
