"""One budget for all heads of a layer, which share it out as their attention asks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from statekv.cache.policies.base import Candidates, Policy
from statekv.errors import ConfigError
from statekv.ops import select

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
        wanted = scores.float().masked_fill(~kept, _NONE)
        sure = select.best(wanted, min(int(self.floor * candidates.budget), keys))
        wanted = wanted.masked_fill(sure & (wanted != _NONE), float("inf")).view(streams, 1, -1)
        best = select.best(wanted, heads * min(candidates.budget, keys))  # of all heads together
        return torch.zeros_like(wanted).masked_fill(~best | (wanted == _NONE), _NONE).view(scores.shape)
