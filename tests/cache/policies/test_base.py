"""Which tokens each rule lets go on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from statekv.cache.policies.base import Rule
from statekv.ops import select

SHAPE = (2, 3, 40)  # streams, heads, keys


def token_ids(seed: int = 0) -> torch.Tensor:
    """Slots in any order, another one in each head: 40 of 100 tokens, the newest 8 among them."""
    generator = torch.Generator().manual_seed(seed)

    def head() -> torch.Tensor:
        held = torch.cat([torch.randperm(92, generator=generator)[:32], torch.arange(92, 100)])
        return held[torch.randperm(40, generator=generator)]

    return torch.stack([head() for _ in range(6)]).view(SHAPE).int()


def scores(seed: int = 0) -> torch.Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed))


def kept(carry: str, slots: torch.Tensor, budget: int, sinks: int = 0, seed: int = 0, pinned: int = 0) -> torch.Tensor:
    """[streams, heads, budget] token numbers that stay, ascending."""
    rule = Rule(carry, sinks=sinks, seed=seed, pinned=pinned)
    chosen = select.best(rule(scores(), slots), budget)
    return slots[chosen].view(*SHAPE[:2], budget).sort(-1).values


def test_attention_is_the_highest_scores() -> None:
    expected = token_ids().gather(-1, scores().topk(15).indices).sort(-1).values
    assert torch.equal(kept("attention", token_ids(), 15), expected)


@pytest.mark.parametrize("budget", [1, 8, 15, 40])
def test_recent_is_exactly_the_newest(budget: int) -> None:
    assert torch.equal(kept("recent", token_ids(), budget, sinks=4), token_ids().sort(-1).values[..., -budget:])


@pytest.mark.parametrize(("budget", "sinks"), [(15, 0), (15, 4), (15, 14), (5, 4)])
def test_sink_recent_is_the_sinks_and_the_newest(budget: int, sinks: int) -> None:
    tokens = torch.arange(40, dtype=torch.int32).expand(SHAPE)
    expected = [*range(sinks), *range(40 - (budget - sinks), 40)]
    assert (kept("sink_recent", tokens, budget, sinks=sinks) == torch.tensor(expected)).all()


def test_long_streams_still_tell_neighbours_apart() -> None:
    slots = (token_ids() + 2**24 - 101).int()
    assert torch.equal(kept("recent", slots, 15), slots.sort(-1).values[..., -15:])


@pytest.mark.parametrize("carry", ["attention", "recent", "sink_recent", "random"])
def test_a_pinned_prefix_always_stays(carry: str) -> None:
    tokens = torch.arange(40, dtype=torch.int32).expand(SHAPE)
    for seed in range(10):
        found = kept(carry, tokens, 12, sinks=4, seed=seed, pinned=10)
        assert (found[..., :10] == torch.arange(10)).all()


def test_pinned_and_sinks_overlap() -> None:
    tokens = torch.arange(40, dtype=torch.int32).expand(SHAPE)
    assert (kept("sink_recent", tokens, 8, sinks=5, pinned=2) == torch.tensor([0, 1, 2, 3, 4, 37, 38, 39])).all()
    assert (kept("sink_recent", tokens, 8, sinks=2, pinned=5) == torch.tensor([0, 1, 2, 3, 4, 37, 38, 39])).all()


def test_what_is_left_beside_a_pinned_prefix_goes_by_score() -> None:
    tokens = torch.arange(40, dtype=torch.int32).expand(SHAPE)
    expected = 10 + scores()[..., 10:].topk(5).indices.sort(-1).values
    assert torch.equal(kept("attention", tokens, 15, pinned=10)[..., 10:], expected.int())


def test_random_repeats_itself_with_its_seed() -> None:
    def draw(seed: int) -> torch.Tensor:
        rule = Rule("random", sinks=0, seed=seed, pinned=0)
        return torch.stack([rule(None, token_ids()) for _ in range(3)])

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_random_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    Rule("random", sinks=0, seed=0, pinned=0)(None, token_ids())
    assert torch.equal(torch.rand(4), expected)


def test_random_ignores_the_scores() -> None:
    rules = [Rule("random", sinks=0, seed=3, pinned=0) for _ in range(2)]
    assert torch.equal(rules[0](scores(1), token_ids()), rules[1](None, token_ids()))


def dial(slots: torch.Tensor, budget: int, pinned: int = 0, seed: int = 0, **dials: Any) -> torch.Tensor:
    """[streams, heads, budget] token numbers that carry attention keeps with its dials, ascending."""
    newest, values = dials.pop("newest", None), dials.pop("values", None)
    rule = Rule("attention", sinks=0, seed=seed, pinned=pinned, **dials)
    found = rule(scores(), slots, layer=2, values=values, budget=budget, newest=newest)
    return slots[select.best(found, budget)].view(*SHAPE[:2], budget).sort(-1).values


def test_value_norms_multiply() -> None:
    values = torch.randn(*SHAPE, 4, generator=torch.Generator().manual_seed(7))
    worth = scores() * values.square().sum(-1).sqrt()
    expected = token_ids().gather(-1, worth.topk(15).indices).sort(-1).values
    assert torch.equal(dial(token_ids(), 15, values=values, value_norms=True), expected)
    assert not torch.equal(expected, dial(token_ids(), 15))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_of_one_length_change_nothing(dtype: torch.dtype) -> None:
    values = torch.full((*SHAPE, 4), 0.5, dtype=dtype)  # a length of 1
    assert torch.equal(dial(token_ids(), 15, values=values, value_norms=True), dial(token_ids(), 15))


@pytest.mark.parametrize("pinned", [0, 6])
def test_full_coverage_is_random(pinned: int) -> None:
    tokens = torch.arange(40, dtype=torch.int32).expand(SHAPE)
    lots = Rule("random", sinks=0, seed=5, pinned=pinned)(None, tokens, 2)
    expected = tokens[select.best(lots, 15)].view(*SHAPE[:2], 15).sort(-1).values
    assert torch.equal(dial(tokens, 15, pinned, seed=5, coverage=1.0), expected)


@pytest.mark.parametrize(("coverage", "sampled"), [(0.2, 3), (0.5, 8), (0.01, 0)])
def test_coverage_is_a_sample_and_the_best_of_the_others(coverage: float, sampled: int) -> None:
    lots = Rule("random", sinks=0, seed=5, pinned=0)(None, token_ids(), 2)
    sample = torch.zeros(SHAPE, dtype=torch.bool).scatter_(-1, lots.topk(sampled).indices, True)
    others = scores().masked_fill(sample, -1).topk(15 - sampled).indices
    expected = token_ids()[sample.scatter(-1, others, True)].view(*SHAPE[:2], 15).sort(-1).values
    assert torch.equal(dial(token_ids(), 15, seed=5, coverage=coverage), expected)


def test_what_is_pinned_is_no_part_of_the_sample() -> None:
    rule = Rule("attention", sinks=0, seed=0, pinned=5, coverage=0.5)
    assert (rule.covering(15), rule.chosen(15)) == (5, 5)
    found = dial(torch.arange(40, dtype=torch.int32).expand(SHAPE), 15, 5, coverage=0.5)
    assert (found[..., :5] == torch.arange(5)).all()
    unpinned = Rule("attention", sinks=0, seed=0, pinned=0, coverage=0.5)
    assert (unpinned.covering(16), unpinned.chosen(16)) == (8, 8)


@pytest.mark.parametrize("first", [92, 99, 100])
def test_the_newest_stay_and_the_best_of_the_others(first: int) -> None:
    newest = token_ids() >= first
    others = scores().masked_fill(newest, -1).topk(10 - (100 - first)).indices
    expected = token_ids()[newest.scatter(-1, others, True)].view(*SHAPE[:2], 10).sort(-1).values
    assert torch.equal(dial(token_ids(), 10, newest=torch.tensor(first, dtype=torch.int32)), expected)
