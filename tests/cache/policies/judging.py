"""Keys that a policy judges, and which of them stay."""

from __future__ import annotations

from typing import Any

import torch

from statekv.cache.policies import Candidates, Policy
from statekv.ops import select
from tests.cache.tokens import policy

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


def dial(slots: torch.Tensor, budget: int, pinned: int = 0, seed: int = 0, **dials: Any) -> torch.Tensor:
    """[streams, heads, budget] token numbers that carry attention keeps with its dials, ascending."""
    newest, values = dials.pop("newest", None), dials.pop("values", None)
    found = judge(policy(pinned=pinned, seed=seed, **dials), slots, scores(), 2, budget, values, newest)
    return slots[select.best(found, budget)].view(*SHAPE[:2], budget).sort(-1).values


def asked(
    judged: Policy, attention: torch.Tensor, values: torch.Tensor | None = None, budget: int = 15, **more: Any
) -> torch.Tensor:
    """[streams, heads, K]: scores for keys of these attentions, in the order of their numbers."""
    slots = torch.arange(attention.shape[-1], dtype=torch.int32).expand(attention.shape)
    blank = torch.zeros(*attention.shape, 4)
    given = Candidates(0, budget, blank, blank if values is None else values, slots, attention, **more)
    return judged.score(given)
