"""The static step does to both memories exactly what the ordinary one does."""

from __future__ import annotations

import gc

import pytest
import torch

from statekv.cache.carried import CarriedCache
from statekv.cache.detailed import DetailedCache
from statekv.cache.geometry import Geometry
from statekv.cache.policies.carry import Rule
from statekv.cache.static import StaticStep

BUDGET, TOKENS = 12, 5


def full(carry: str = "attention", streams: int = 2, slope: float = 0.0, decay: float = 0.0) -> CarriedCache:
    geometry = Geometry(3, 4, torch.float32, (torch.device("cpu"),) * 2, streams)
    rule = Rule(carry, sinks=2, seed=1, pinned=1)
    cache = CarriedCache(geometry, BUDGET, rule, DetailedCache(geometry), slope, decay)
    for number in range(3):
        walk(cache, cache, TOKENS, number)
    return cache


def walk(cache: CarriedCache | StaticStep, carried: CarriedCache, tokens: int, seed: int) -> list[torch.Tensor]:
    """One step of random keys through all layers; the keys that attention would have seen."""
    generator = torch.Generator().manual_seed(seed)
    shape = (carried.geometry.streams, carried.geometry.kv_heads, tokens, carried.geometry.head_dim)
    carried.make_room(tokens)
    seen = []
    for layer in range(carried.geometry.layers):
        key, value = (torch.randn(shape, generator=generator) for _ in range(2))
        keys, values = cache.update(key, value, layer)
        seen += [keys.clone(), values.clone()]
        cache.evict(layer, torch.rand(keys.shape[:3], generator=generator))
    return seen


def assert_same(found: CarriedCache, expected: CarriedCache) -> None:
    assert found.lengths == expected.lengths
    assert found.detailed.lengths == expected.detailed.lengths
    for layer in range(found.geometry.layers):
        length = found.lengths[layer]
        assert torch.equal(found.born[layer][..., :length], expected.born[layer][..., :length])
        assert torch.equal(found.buffers[layer][..., :length, :], expected.buffers[layer][..., :length, :])
        for total, other in zip(found.totals[layer : layer + 1], expected.totals[layer : layer + 1], strict=True):
            assert torch.equal(total[..., :length], other[..., :length])
        assert torch.equal(found.detailed.keys(layer), expected.detailed.keys(layer))
        assert torch.equal(found.detailed.values(layer), expected.detailed.values(layer))


@pytest.mark.parametrize(("slope", "decay"), [(0.0, 0.0), (0.25, 0.0), (-0.25, 0.5), (0.0, 1.0)])
@pytest.mark.parametrize("carry", ["attention", "recent", "sink_recent", "random"])
def test_static_steps_equal_ordinary_ones(carry: str, slope: float, decay: float) -> None:
    mine, other = (full(carry, slope=slope, decay=decay) for _ in range(2))
    assert mine.full
    static = StaticStep(mine, TOKENS)
    for number in range(10, 16):
        mine.make_room(TOKENS)
        mine.detailed.make_room(TOKENS)
        static.begin()
        seen = walk(static, mine, TOKENS, number)
        static.end()
        expected = walk(other, other, TOKENS, number)
        assert all(map(torch.equal, seen, expected))
        assert_same(mine, other)


def test_repeating_the_same_commands_needs_only_a_new_beginning() -> None:
    """What a recording replays: nothing but the contents of `places` tells one step from the next."""
    mine, other = full(), full()
    mine.make_room(TOKENS)
    mine.detailed.reserve(100)
    static = StaticStep(mine, TOKENS)
    for number in (20, 21):
        addresses = [place.data_ptr() for place in static.places.values()]
        static.begin()
        assert [place.data_ptr() for place in static.places.values()] == addresses
        assert [place.tolist() for place in static.places.values()] == [
            list(range(mine.detailed.length, mine.detailed.length + TOKENS))
        ]
        walk(static, mine, TOKENS, number)
        assert mine.detailed.length == other.detailed.length  # not before `end`
        static.end()
        walk(other, other, TOKENS, number)
        assert_same(mine, other)


def test_lengths_are_those_of_the_carried_cache() -> None:
    cache = full()
    static = StaticStep(cache, TOKENS)
    assert len(static) == 2
    assert static.get_seq_length() == BUDGET
    assert cache.full


def test_it_does_not_keep_its_stream() -> None:
    cache = full()
    static = StaticStep(cache, TOKENS)
    del cache
    gc.collect()
    with pytest.raises(AssertionError, match="outlived"):
        _ = static.carried
