"""One budget for all heads of a layer, which share it out as their attention asks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from statekv.cache.policies.base import Candidates, Policy
from statekv.errors import ConfigError

_NONE = float("-inf")


@dataclass(frozen=True)
class AdaKV(Policy):
    """The best keys of a layer wherever they lie: a head that spreads its attention keeps more than one that does not.

    Ada-KV (arXiv 2407.11550) chooses once, at the end of a prompt, by the newest queries; here each step chooses anew,
    by its own. Heads of different length would need kernels of their own: here every head has as many slots as the
    largest share, and those that a head does not fill are empty, so that the carried cache takes `most` times the
    memory and the products of an even one.

    Attributes:
        floor: share of the budget that every head keeps for itself (the paper's alpha safeguard); 1 is an even budget.
        most: largest share of a head, in budgets.

    Raises:
        ConfigError: a number outside its range.
    """

    needs_attention = True
    weighs = True

    floor: float = 0.2
    most: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise ConfigError(f"floor is {self.floor!r}, but must be a number from 0 to 1", "leave it out for 0.2")
        if not 1 <= self.most < float("inf"):
            raise ConfigError(f"most is {self.most!r}, but must be a number of at least 1", "leave it out for 2")

    def score(self, candidates: Candidates) -> torch.Tensor:
        return candidates.attended

    def slots(self, budget: int) -> int:
        return int(self.most * budget)

    def log_weights(self, candidates: Candidates, scores: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """0 for the layer's best keys among those that stay, -inf for all others."""
        streams, heads, keys = scores.shape
        own = int(self.floor * candidates.budget)
        order = scores.argsort(dim=-1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(-1, order, torch.arange(keys, device=order.device).expand_as(order))
        wanted = scores.float().masked_fill(rank < own, float("inf")).masked_fill(~kept, _NONE)
        wanted = wanted.masked_fill(scores == _NONE, _NONE).view(streams, -1)
        number = min(heads * candidates.budget, heads * keys)
        best = torch.zeros_like(wanted, dtype=torch.bool).scatter_(-1, wanted.topk(number).indices, True)
        filled = (best & (wanted != _NONE)).view(scores.shape)
        return torch.zeros_like(scores, dtype=torch.float32).masked_fill(~filled, _NONE)
