"""Carried caches that move into one block and out of it again."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from statekv.cache.batched import BatchedCarriedCache, StaticCarriedCache
from statekv.cache.carried import CarriedCache
from statekv.cache.detailed import DetailedCache
from statekv.cache.spec import KVSpec
from statekv.config import CARRIES
from tests.cache.tokens import policy

CPU = torch.device("cpu")
GEOMETRY = KVSpec(kv_heads=2, head_dim=4, dtype=torch.float32, devices=(CPU,) * 3)
BUDGET, STEP = 10, 4


# Each with dials that mean something beside it.
POLICIES: dict[str, dict[str, Any]] = {
    **{carry: {"carry": carry} for carry in CARRIES},
    "decay": {"decay": 0.5},
    "sum": {"decay": 1.0},
    "layers": {"layer_slope": 0.25},
    "ada_kv, all": {"carry": "ada_kv(floor=0.1)", "layer_slope": -0.25, "decay": 0.5, "coverage": 0.3},
}
EVERY_POLICY = pytest.mark.parametrize("settings", POLICIES.values(), ids=POLICIES)


def caches(count: int, **settings: Any) -> list[CarriedCache]:
    made = policy(**settings)
    return [CarriedCache(GEOMETRY, BUDGET, made, DetailedCache(GEOMETRY)) for _ in range(count)]


def keys(count: int, number: int) -> torch.Tensor:
    """[layers, 2, count, kv_heads, STEP, head_dim], the same rows for every count."""
    drawn = torch.randn(8, 3, 2, 2, STEP, 4, generator=torch.Generator().manual_seed(number))
    return drawn[:count].movedim(0, 2)


def scores(count: int, length: int, number: int) -> torch.Tensor:
    """[layers, count, kv_heads, length], the same rows for every count."""
    drawn = torch.rand(8, 3, 2, length, generator=torch.Generator().manual_seed(number))
    return drawn[:count].movedim(0, 1)


def step_alone(members: list[CarriedCache], number: int) -> None:
    fresh = keys(len(members), number)
    for row, cache in enumerate(members):
        cache.open_slots(STEP)
        for layer in range(3):
            key, value = fresh[layer, :, row : row + 1]
            seen, _ = cache.update(key, value, layer)
            if cache.must_evict(0):
                cache.evict(layer, scores(len(members), seen.shape[-2], number)[layer, row : row + 1])


def step_together(block: BatchedCarriedCache, number: int) -> None:
    count = len(block.members)
    fresh = keys(count, number)
    block.begin()
    block.open_slots(STEP)
    for layer in range(3):
        seen, _ = block.update(*fresh[layer], layer)
        assert seen.shape[0] == count
        if block.must_evict(0):
            block.evict(layer, scores(count, seen.shape[-2], number)[layer])
    block.end()


def assert_same(found: list[CarriedCache], expected: list[CarriedCache]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.lengths == b.lengths
        for layer, length in enumerate(a.lengths):
            assert torch.equal(a.buffers[layer][..., :length, :], b.buffers[layer][..., :length, :])
            assert torch.equal(a.token_ids[layer][..., :length], b.token_ids[layer][..., :length])
            assert torch.equal(a.detailed.keys(layer), b.detailed.keys(layer))
            assert torch.equal(a.detailed.values(layer), b.detailed.values(layer))
            assert a.state[layer].keys() == b.state[layer].keys()
            for name, tensor in a.state[layer].items():
                assert torch.equal(tensor[..., :length], b.state[layer][name][..., :length])


@EVERY_POLICY
def test_steps_in_a_block_equal_steps_alone(settings: dict[str, Any]) -> None:
    mine, alone = caches(3, **settings), caches(3, **settings)
    block = BatchedCarriedCache(mine)
    for number in range(8):
        step_alone(alone, number)
        step_together(block, number)
        assert_same(mine, alone)


def test_members_step_alone_in_between() -> None:
    mine, alone = caches(2), caches(2)
    block = BatchedCarriedCache(mine)
    for number in range(9):
        step_alone(alone, number)
        if number % 3 == 1:
            step_alone(mine, number)
        else:
            block = block if block.holds(mine) else BatchedCarriedCache(mine)
            step_together(block, number)
        assert_same(mine, alone)


def test_a_full_block_stays_where_it_is() -> None:
    mine = caches(3)
    block = BatchedCarriedCache(mine)
    for number in range(4):
        step_together(block, number)
    places = [buffer.data_ptr() for buffer in block.buffers]
    for number in range(4, 8):
        step_together(block, number)
        assert block.holds(mine)
    assert [buffer.data_ptr() for buffer in block.buffers] == places
    rows = [member.buffers[0].data_ptr() for member in mine]
    assert rows == [block.buffers[0][0, row].data_ptr() for row in range(3)]
    assert sum(member.nbytes for member in mine) == block.nbytes


def test_a_member_that_needs_other_slots_moves_out() -> None:
    mine = caches(2)
    block = BatchedCarriedCache(mine)
    step_together(block, 0)
    mine[0].allocate([100] * 3)
    assert not block.holds(mine)
    step_alone(mine, 1)
    expected = caches(2)
    for number in range(2):
        step_alone(expected, number)
    assert_same(mine, expected)


def test_others_or_another_order_do_not_live_there() -> None:
    mine = caches(3)
    block = BatchedCarriedCache(mine)
    assert block.holds(mine)
    assert not block.holds(mine[::-1])
    assert not block.holds(mine[:2])
    assert not block.holds([*mine[:2], *caches(1)])


def test_disbanded_members_have_memory_of_their_own() -> None:
    mine, alone = caches(3), caches(3)
    block = BatchedCarriedCache(mine)
    for number in range(5):
        step_together(block, number)
        step_alone(alone, number)
    gone = [weakref.ref(buffer.untyped_storage()) for buffer in block.buffers]
    block.disband()
    del block
    gc.collect()
    assert all(storage() is None for storage in gone)
    assert_same(mine, alone)
    step_alone(mine, 5)
    step_alone(alone, 5)
    assert_same(mine, alone)


def test_a_block_does_not_keep_its_members() -> None:
    mine = caches(2)
    block = BatchedCarriedCache(mine)
    one = weakref.ref(mine.pop())
    gc.collect()
    assert one() is None
    assert block.members == mine


def test_members_of_different_age_pin_steps_of_their_own() -> None:
    mine, alone = caches(3), caches(3)
    for number in range(4):
        step_alone(mine, number)
        step_alone(alone, number)
    for members in (mine, alone):  # the second has seen more
        for number in range(4, 7):
            step_alone(members[1:2], number)
    for number in range(7, 12):
        for member in (*mine, *alone):
            member.pin_from(member.detailed.length - STEP)
        step_alone(alone, number)
        block = BatchedCarriedCache(mine)
        step_together(block, number)
        assert_same(mine, alone)
        pinned = range(mine[0].detailed.length - 2 * STEP, mine[0].detailed.length)
        assert mine[0].kept(0)[0, 0, -2 * STEP :].tolist() == list(pinned)


BUDGET_STATIC, TOKENS = 12, 5


def full(**settings: Any) -> CarriedCache:
    spec = KVSpec(3, 4, torch.float32, (torch.device("cpu"),) * 2, streams=2)
    cache = CarriedCache(spec, BUDGET_STATIC, policy(pinned=1, sinks=2, seed=1, **settings), DetailedCache(spec))
    for number in range(6):
        walk(cache, cache, TOKENS, number)
    assert cache.full
    return cache


def walk(cache: CarriedCache | StaticCarriedCache, carried: CarriedCache, tokens: int, seed: int) -> list[torch.Tensor]:
    """One step of random keys through all layers; the keys that attention would have seen."""
    generator = torch.Generator().manual_seed(seed)
    shape = (carried.spec.streams, carried.spec.kv_heads, tokens, carried.spec.head_dim)
    carried.open_slots(tokens)
    seen = []
    for layer in range(carried.spec.layers):
        key, value = (torch.randn(shape, generator=generator) for _ in range(2))
        keys, values = cache.update(key, value, layer)
        seen += [keys.clone(), values.clone()]
        cache.evict(layer, torch.rand(keys.shape[:3], generator=generator))
    return seen


def assert_same_static(found: CarriedCache, expected: CarriedCache) -> None:
    assert found.lengths == expected.lengths
    assert found.detailed.lengths == expected.detailed.lengths
    for layer in range(found.spec.layers):
        length = found.lengths[layer]
        assert torch.equal(found.token_ids[layer][..., :length], expected.token_ids[layer][..., :length])
        assert torch.equal(found.buffers[layer][..., :length, :], expected.buffers[layer][..., :length, :])
        assert found.state[layer].keys() == expected.state[layer].keys()
        for name, tensor in found.state[layer].items():
            assert torch.equal(tensor[..., :length], expected.state[layer][name][..., :length])
        assert torch.equal(found.detailed.keys(layer), expected.detailed.keys(layer))
        assert torch.equal(found.detailed.values(layer), expected.detailed.values(layer))


@EVERY_POLICY
def test_static_steps_equal_ordinary_ones(settings: dict[str, Any]) -> None:
    mine, other = full(**settings), full(**settings)
    static = StaticCarriedCache(mine, TOKENS)
    for number in range(10, 16):
        mine.open_slots(TOKENS)
        mine.detailed.make_room(TOKENS)
        static.begin()
        seen = walk(static, mine, TOKENS, number)
        static.end()
        expected = walk(other, other, TOKENS, number)
        assert all(map(torch.equal, seen, expected))
        assert_same_static(mine, other)


def test_repeating_the_same_commands_needs_only_a_new_beginning() -> None:
    """What a recording replays: nothing but the contents of `places` tells one step from the next."""
    mine, other = full(), full()
    mine.open_slots(TOKENS)
    mine.detailed.reserve(100)
    static = StaticCarriedCache(mine, TOKENS)
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
        assert_same_static(mine, other)


def test_lengths_are_those_of_the_carried_cache() -> None:
    cache = full()
    static = StaticCarriedCache(cache, TOKENS)
    assert len(static) == 2
    assert static.get_seq_length() == BUDGET_STATIC
    assert cache.full


def test_it_does_not_keep_its_stream() -> None:
    cache = full()
    static = StaticCarriedCache(cache, TOKENS)
    del cache
    gc.collect()
    with pytest.raises(AssertionError, match="outlived"):
        _ = static.carried


FAR = 2**31 - 18  # tokens


@EVERY_POLICY
def test_members_of_any_age_share_a_block(settings: dict[str, Any]) -> None:
    """The block widens when the first of them has seen 2^31 tokens."""
    mine, alone = caches(3, **settings), caches(3, **settings)
    block = BatchedCarriedCache(mine)
    for number in range(12):
        if number == 4:
            for members in (mine, alone):
                members[1].detailed.away += FAR
        block = block if block.holds(mine) else BatchedCarriedCache(mine)
        step_alone(alone, number)
        step_together(block, number)
        assert_same(mine, alone)
    assert mine[1].detailed.length > 2**31
    assert block.token_ids[0].dtype == torch.int64


def test_a_recorded_step_writes_numbers_beyond_int32() -> None:
    plain, fast = full(), full()
    for cache in (plain, fast):
        cache.detailed.away += FAR
    static = StaticCarriedCache(fast, TOKENS)
    for number in range(6, 14):
        fast.open_slots(TOKENS)
        fast.detailed.make_room(TOKENS)
        static.begin()
        walk(static, fast, TOKENS, number)
        static.end()
        walk(plain, plain, TOKENS, number)
        assert_same_static(fast, plain)
    assert int(fast.kept(0).max()) > 2**31
