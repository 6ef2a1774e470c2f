"""Rules that are only measured: each keeps what its idea says."""

from __future__ import annotations

import torch

from benchmarks.rivals import Coreset, EachQuery, ValuesAndChance
from statekv.cache.policies import Candidates, Policy
from statekv.ops import select


def of(keys: torch.Tensor, values: torch.Tensor, attention: torch.Tensor, first_own: int, budget: int) -> Candidates:
    """Of one stream and head: [K, D] twice, [K]."""
    ids = torch.arange(len(keys), dtype=torch.int32)[None, None]
    return Candidates(0, budget, keys[None, None], values[None, None], ids, attention[None, None], first_own)


def kept(policy: Policy, given: Candidates) -> list[int]:
    numbers: list[int] = select.best(policy.score(given), given.budget)[0, 0].nonzero().flatten().tolist()
    return numbers


def test_each_query_divides_by_those_who_see() -> None:
    attention = torch.tensor([4.0, 4.0, 4.0, 3.0, 2.0, 1.0])  # four own tokens, seen by 4, 3, 2 and 1 queries
    found = EachQuery().score(of(torch.randn(6, 4), torch.randn(6, 4), attention, 2, 3))
    assert found.flatten().tolist() == [1, 1, 1, 1, 1, 1]


def test_long_values_stay_whoever_attends() -> None:
    values = torch.ones(40, 4)
    values[[3, 17]] *= 100
    attention = torch.ones(40)
    attention[[3, 17]] = 0
    given = of(torch.randn(40, 4), values, attention, 30, 20)
    assert {3, 17} <= set(kept(ValuesAndChance(), given))
    assert kept(ValuesAndChance(seed=1), given) != kept(ValuesAndChance(seed=2), given)
    assert not {3, 17} & set(kept(ValuesAndChance(reserved=0), given))


def test_a_coreset_has_a_key_of_each_cluster() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(8)[torch.arange(64) % 8 // 2 * 2]  # four of them, 16 keys each
    near = centres + 0.01 * torch.randn(64, 8, generator=generator)
    found = kept(Coreset(), of(near, near, torch.ones(64), 50, 4))
    assert sorted(number % 8 // 2 for number in found) == [0, 1, 2, 3]
    everything = of(near, near, torch.ones(64), 50, 64)
    assert kept(Coreset(), everything) == list(range(64))
