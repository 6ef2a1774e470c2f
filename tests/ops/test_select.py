"""In-place replacement holds the same keys as a plain gather would."""

from __future__ import annotations

import pytest
import torch

from statekv.ops import select

# (keys, budget): a short step, a step as long as the budget and longer, nothing or all but one to evict, budget 1.
SIZES = [(12, 9), (12, 6), (12, 4), (30, 5), (7, 7), (8, 7), (5, 1), (1, 1)]


def scores(keys: int, seed: int, streams: int = 2, kv_heads: int = 3) -> torch.Tensor:
    return torch.rand(streams, kv_heads, keys, generator=torch.Generator().manual_seed(seed))


def numbered(streams: int, kv_heads: int, slots: int) -> torch.Tensor:
    """[2, streams, kv_heads, slots, 2]: every slot holds its own number, and keys differ from values."""
    slot = torch.arange(slots, dtype=torch.float32)
    keys = torch.stack([slot, slot + 1000], -1).expand(streams, kv_heads, slots, 2)
    return torch.stack([keys, -keys])


@pytest.mark.parametrize(("keys", "budget"), SIZES)
def test_best_keeps_the_highest_of_each_head(keys: int, budget: int) -> None:
    for seed in range(10):
        found = scores(keys, seed)
        kept = select.best(found, budget)
        assert kept.dtype == torch.bool
        assert (kept.sum(-1) == budget).all()
        lowest_kept = found.masked_fill(~kept, 2).amin(-1)
        highest_dropped = found.masked_fill(kept, -1).amax(-1)
        assert (lowest_kept > highest_dropped).all()


def test_best_takes_heads_and_streams_apart() -> None:
    found = scores(20, seed=0)
    alone = torch.stack([torch.stack([select.best(head[None, None], 8)[0, 0] for head in row]) for row in found])
    assert torch.equal(select.best(found, 8), alone)
    assert len({tuple(row) for row in alone.flatten(0, 1).tolist()}) == 6


@pytest.mark.parametrize("value", [0.0, float("inf")])
def test_ties_do_not_change_the_number_kept(value: float) -> None:
    kept = select.best(torch.full((2, 3, 9), value), 4)
    assert (kept.sum(-1) == 4).all()


@pytest.mark.parametrize("number", [0, 1, 3, 8, 20, 21])
def test_earliest_best_is_what_sorting_finds(number: int) -> None:
    """Few values, so that many are equal."""
    for seed in range(20):
        found = torch.randint(4, (20,), generator=torch.Generator().manual_seed(seed)).float()
        found[seed % 7] = -torch.inf
        expected = torch.zeros(20, dtype=torch.bool)
        expected[found.argsort(descending=True, stable=True)[:number]] = True
        assert torch.equal(select.earliest_best(found, number), expected)
    assert select.earliest_best(torch.empty(0), number).shape == (0,)


@pytest.mark.parametrize(("keys", "budget"), SIZES)
def test_moves_hold_what_a_gather_would(keys: int, budget: int) -> None:
    for seed in range(50):
        kept = select.best(scores(keys, seed), budget)
        buffer = numbered(2, 3, keys)
        before = buffer.clone()
        source, target = select.moves(kept, budget)
        select.apply_moves(buffer, source, target)
        for s in range(2):
            for h in range(3):
                slots = buffer[0, s, h, :budget, 0]
                gathered = before[0, s, h, kept[s, h], 0]
                assert torch.equal(slots.sort().values, gathered)
                # Both halves of a key and its value moved together.
                assert torch.equal(buffer[0, s, h, :budget, 1], slots + 1000)
                assert torch.equal(buffer[1, s, h, :budget], -buffer[0, s, h, :budget])
                # Those that were in front already stay where they are.
                settled = kept[s, h, :budget]
                assert torch.equal(slots[settled], before[0, s, h, :budget, 0][settled])


@pytest.mark.parametrize(("keys", "budget"), SIZES)
def test_the_shape_of_moves_does_not_depend_on_the_data(keys: int, budget: int) -> None:
    oldest = torch.arange(keys, 0, -1, dtype=torch.float32).expand(2, 3, keys)
    for found in (oldest, -oldest, scores(keys, 1)):
        source, target = select.moves(select.best(found, budget), budget)
        assert source.shape == target.shape == (2, 3, min(keys - budget, budget))
        assert source.dtype == target.dtype == torch.int64


@pytest.mark.parametrize(("keys", "budget"), SIZES)
def test_targets_are_different_slots_of_the_budget(keys: int, budget: int) -> None:
    for seed in range(20):
        _, target = select.moves(select.best(scores(keys, seed), budget), budget)
        assert (target < budget).all()
        assert all(len(set(row)) == len(row) for row in target.flatten(0, 1).tolist())


def test_nothing_moves_when_the_front_is_kept() -> None:
    oldest = torch.arange(12, 0, -1, dtype=torch.float32).expand(2, 3, 12)
    source, target = select.moves(select.best(oldest, 8), 8)
    assert torch.equal(source, target)


def test_moves_reach_into_a_view_and_leave_the_rest() -> None:
    whole = numbered(1, 1, 10)
    kept = torch.tensor([[[True, False, True, False, True, False]]])
    select.apply_moves(whole[..., :6, :], *select.moves(kept, 3))
    assert whole[0, 0, 0, :, 0].tolist() == [0, 4, 2, 3, 4, 5, 6, 7, 8, 9]
