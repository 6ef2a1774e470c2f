"""One budget for all heads of a layer."""

from __future__ import annotations

import torch

from statekv.cache.policies import Candidates
from statekv.cache.policies.ada_kv import AdaKV
from statekv.ops import select
from tests.cache.policies.judging import SHAPE, scores, token_ids


def held(judged: AdaKV, attention: torch.Tensor, budget: int = 10) -> torch.Tensor:
    """[streams, heads, K] bool: keys whose slots are not left empty."""
    blank = torch.zeros(*SHAPE, 4)
    candidates = Candidates(0, budget, blank, blank, token_ids(), attention)
    found = judged.score(candidates)
    kept = select.best(found, judged.slots(budget))
    return kept & (judged.log_weights(candidates, found, kept) == 0)


def test_with_the_whole_budget_as_its_floor_every_head_keeps_its_best() -> None:
    assert torch.equal(held(AdaKV(floor=1), scores()), select.best(scores(), 10))


def test_without_a_floor_the_best_of_all_heads_stay() -> None:
    found = held(AdaKV(floor=0, most=4), scores())
    expected = scores().flatten(1).topk(30).indices
    assert torch.equal(found.flatten(1).nonzero()[:, 1].view(2, 30), expected.sort(-1).values)


def test_a_head_without_attention_keeps_its_floor_and_one_with_all_of_it_no_more_than_its_slots() -> None:
    attention = scores()
    attention[:, 0] *= 1e-6
    attention[:, 1] += 10
    counts = held(AdaKV(floor=0.2, most=2), attention).sum(-1)
    assert counts.tolist() == [[2, 20, 8]] * 2
