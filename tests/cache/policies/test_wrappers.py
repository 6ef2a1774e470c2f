"""What goes around any policy, and by itself changes nothing."""

from __future__ import annotations

import pytest
import torch

from statekv.cache.policies import Candidates, Policy
from statekv.cache.policies.accumulated import Accumulated
from statekv.cache.policies.ada_kv import AdaKV
from statekv.cache.policies.attention import Attention
from statekv.cache.policies.caote import Caote
from statekv.cache.policies.key_norm import KeyNorm
from statekv.cache.policies.random import Random, lots
from statekv.cache.policies.recent import Recent
from statekv.cache.policies.stochastic import Stochastic
from statekv.cache.policies.weighted import Weighted
from statekv.cache.policies.wrappers import Wrapper, covering
from statekv.ops import select
from tests.cache.policies.judging import SHAPE, dial, judge, kept, scores, token_ids
from tests.cache.tokens import policy


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


POLICIES: list[Policy] = [
    Attention(),
    Recent(),
    Random(seed=3),
    KeyNorm(),
    Accumulated(decay=0.5),
    Caote(),
    AdaKV(),
    Stochastic(temperature=0.5, seed=1),
    Weighted(seed=1),
]


@pytest.mark.parametrize("inner", POLICIES, ids=repr)
def test_a_wrapper_that_says_nothing_changes_nothing(inner: Policy) -> None:
    """Scores, log weights, budgets, and what the policy declares of itself."""
    around = Wrapper(Wrapper(inner))
    generator = torch.Generator().manual_seed(2)
    keys, values = torch.randn(2, *SHAPE, 4, generator=generator)
    found = []
    for judged in (inner, around):
        state = {name: torch.full(SHAPE, began) for name, began in judged.state.items()}
        state["log_weights"] = torch.zeros(SHAPE)
        candidates = Candidates(1, 15, keys, values, token_ids(), scores(), first_own=92, state=state)
        judged_scores = judged.score(candidates)
        stay = select.best(judged_scores, judged.slots(15))
        weights = judged.log_weights(candidates, judged_scores, stay) if judged.weighs else torch.zeros(1)
        found.append((judged_scores, weights, *state.values()))
    assert all(map(torch.equal, *found))
    told = ("needs_attention", "every_step", "weighs", "joint_heads", "sinks", "state")
    assert [getattr(around, name) for name in told] == [getattr(inner, name) for name in told]
    assert (around.layer_budgets(15, 4), around.slots(15)) == (inner.layer_budgets(15, 4), inner.slots(15))
