"""Which tokens each rule lets go on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from statekv.cache.policies import Candidates, Policy
from statekv.cache.policies.random import lots
from statekv.cache.policies.wrappers import covering
from statekv.ops import select
from tests.cache.tokens import policy
from tests.method.byhand import lot

SHAPE = (2, 3, 40)  # streams, heads, keys


def token_ids(seed: int = 0) -> torch.Tensor:
    """Slots in any order, another one in each head: 40 of 100 tokens, the newest 8 among them."""
    generator = torch.Generator().manual_seed(seed)

    def head() -> torch.Tensor:
        held = torch.cat([torch.randperm(92, generator=generator)[:32], torch.arange(92, 100)])
        return held[torch.randperm(40, generator=generator)]

    return torch.stack([head() for _ in range(6)]).view(SHAPE).int()


def judge(
    judged: Policy,
    slots: torch.Tensor,
    attention: torch.Tensor | None = None,
    layer: int = 0,
    budget: int = 15,
    values: torch.Tensor | None = None,
    newest: torch.Tensor | None = None,
) -> torch.Tensor:
    """[streams, heads, K]: scores of a policy, for keys of which nothing is known but what is given."""
    blank = torch.zeros(*slots.shape, 4)
    candidates = Candidates(layer, budget, blank, blank if values is None else values, slots, attention, newest=newest)
    return judged.score(candidates)


def scores(seed: int = 0) -> torch.Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed))


def kept(carry: str, slots: torch.Tensor, budget: int, sinks: int = 0, seed: int = 0, pinned: int = 0) -> torch.Tensor:
    """[streams, heads, budget] token numbers that stay, ascending."""
    found = judge(policy(carry, pinned, sinks=sinks, seed=seed), slots, scores())
    chosen = select.best(found, budget)
    return slots[chosen].view(*SHAPE[:2], budget).sort(-1).values


def test_attention_is_the_highest_scores() -> None:
    expected = token_ids().gather(-1, scores().topk(15).indices).sort(-1).values
    assert torch.equal(kept("attention", token_ids(), 15), expected)


@pytest.mark.parametrize("budget", [1, 8, 15, 40])
def test_recent_is_exactly_the_newest(budget: int) -> None:
    assert torch.equal(kept("recent", token_ids(), budget), token_ids().sort(-1).values[..., -budget:])


@pytest.mark.parametrize(("budget", "sinks"), [(15, 0), (15, 4), (15, 14), (5, 4)])
def test_sink_recent_is_the_sinks_and_the_newest(budget: int, sinks: int) -> None:
    tokens = torch.arange(40, dtype=torch.int32).expand(SHAPE)
    expected = [*range(sinks), *range(40 - (budget - sinks), 40)]
    assert (kept("sink_recent", tokens, budget, sinks=sinks) == torch.tensor(expected)).all()


@pytest.mark.parametrize("carry", ["recent", "sink_recent"])
@pytest.mark.parametrize("passed", [2**24, 2**31, 2**40])
def test_long_streams_still_tell_neighbours_apart(carry: str, passed: int) -> None:
    """Numbers in float32 would not."""
    slots = token_ids().long() + passed
    assert torch.equal(kept(carry, slots, 15, sinks=4), slots.sort(-1).values[..., -15:])


def test_lots_are_those_of_splitmix64_for_numbers_and_draws_of_any_size() -> None:
    for token in (0, 7, 2**31 - 1, 2**31, 2**33 + 5):
        for draw in (0, 9, 2**31 - 1, 2**31, 2**33 + 5):
            slots = torch.full((1, 3, 1), token)
            expected = [lot(token, 2, head, 5, draw) / 2**53 for head in range(3)]
            assert lots(slots, 5, 2, draw).flatten().tolist() == expected
            assert lots(slots, 5, 2, torch.tensor([[[draw]]])).flatten().tolist() == expected
            if token < 2**31:
                assert lots(slots.int(), 5, 2, draw).flatten().tolist() == expected


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
        return torch.stack([judge(policy("random", seed=seed), token_ids()) for _ in range(3)])

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_random_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    judge(policy("random"), token_ids())
    assert torch.equal(torch.rand(4), expected)


def test_random_ignores_the_scores() -> None:
    drawn = policy("random", seed=3)
    assert torch.equal(judge(drawn, token_ids(), scores(1)), judge(drawn, token_ids()))


def dial(slots: torch.Tensor, budget: int, pinned: int = 0, seed: int = 0, **dials: Any) -> torch.Tensor:
    """[streams, heads, budget] token numbers that carry attention keeps with its dials, ascending."""
    newest, values = dials.pop("newest", None), dials.pop("values", None)
    found = judge(policy(pinned=pinned, seed=seed, **dials), slots, scores(), 2, budget, values, newest)
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
    drawn = judge(policy("random", pinned, seed=5), tokens, layer=2)
    expected = tokens[select.best(drawn, 15)].view(*SHAPE[:2], 15).sort(-1).values
    assert torch.equal(dial(tokens, 15, pinned, seed=5, coverage=1.0), expected)


@pytest.mark.parametrize(("coverage", "sampled"), [(0.2, 3), (0.5, 8), (0.01, 0)])
def test_coverage_is_a_sample_and_the_best_of_the_others(coverage: float, sampled: int) -> None:
    drawn = lots(token_ids(), 5, 2)
    sample = torch.zeros(SHAPE, dtype=torch.bool).scatter_(-1, drawn.topk(sampled).indices, True)
    others = scores().masked_fill(sample, -1).topk(15 - sampled).indices
    expected = token_ids()[sample.scatter(-1, others, True)].view(*SHAPE[:2], 15).sort(-1).values
    assert torch.equal(dial(token_ids(), 15, seed=5, coverage=coverage), expected)


def test_what_is_pinned_is_no_part_of_the_sample() -> None:
    assert covering(0.5, 15, pinned=5) == 5
    found = dial(torch.arange(40, dtype=torch.int32).expand(SHAPE), 15, 5, coverage=0.5)
    assert (found[..., :5] == torch.arange(5)).all()
    assert covering(0.5, 16, pinned=0) == 8


@pytest.mark.parametrize("first", [92, 99, 100])
def test_the_newest_stay_and_the_best_of_the_others(first: int) -> None:
    newest = token_ids() >= first
    others = scores().masked_fill(newest, -1).topk(10 - (100 - first)).indices
    expected = token_ids()[newest.scatter(-1, others, True)].view(*SHAPE[:2], 10).sort(-1).values
    assert torch.equal(dial(token_ids(), 10, newest=torch.tensor(first, dtype=torch.int32)), expected)
