"""A uniform sample of the whole stream: the control that every choice must beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from statekv.cache.policies.base import Candidates, Policy

_GOLDEN = 0x9E3779B1  # 2^32 over the golden ratio


@dataclass(frozen=True)
class Random(Policy):
    """Every token draws one lot for life, in each layer and head; the highest stay, besides the sinks.

    Without sinks a control is weaker than it need be, and flatters whatever it is compared with.

    Attributes:
        seed: of the lots; None: the configuration's.
    """

    sinks = 4

    seed: int | None = None

    def score(self, candidates: Candidates) -> torch.Tensor:
        return lots(candidates.token_ids, self.seed or 0, candidates.layer)


def lots(token_ids: torch.Tensor, seed: int, layer: int, draw: int | torch.Tensor = 0) -> torch.Tensor:
    """A lot in 0 … 1 for each token, [streams, kv_heads, K] float64, the same whenever it is drawn, and another in each
    layer, in each head and by each seed.

    Drawn anew at each step, old tokens would have to win again and again and die out: a soft recency window. With one
    lot for life, the carried keys are a uniform sample of the whole stream. The mixing is splitmix64's, its counter
    being the draw.

    Args:
        token_ids: [streams, kv_heads, K] int32 or int64.
        draw: number of the draw, for those who want one at each step; int64 that broadcasts against `token_ids`.
    """
    head = torch.arange(token_ids.shape[1], device=token_ids.device).view(-1, 1)  # the same in every stream of a batch
    bits = (token_ids.long() + (head << 34)) ^ ((layer * _GOLDEN + seed * 0x85EBCA77) % 2**62)
    drawn = draw * _GOLDEN
    if isinstance(drawn, int):
        drawn = (drawn + 2**63) % 2**64 - 2**63  # around, as int64 goes
    bits = bits + drawn
    for multiplier, shift in ((-0x40A7B892E31B1A47, 30), (-0x6B2FB644ECCEEE15, 27)):
        bits = (bits ^ ((bits >> shift) & ((1 << (64 - shift)) - 1))) * multiplier
    return ((bits >> 11) & ((1 << 53) - 1)).double() / 2**53
