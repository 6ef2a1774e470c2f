"""Attention over all steps, not only the newest: a policy that remembers something of every key."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import torch

from statekv.cache.policies.base import Candidates, Policy
from statekv.errors import ConfigError

_SEEN = "accumulated"


@dataclass(frozen=True)
class Accumulated(Policy):
    """Keys by the attention that they have received since they entered.

    With decay 1 that is H2O's heavy hitters (arXiv 2306.14048) without its window of newest tokens, which `pin_newest`
    adds; with decay 0 it is the paper's rule.

    Attributes:
        decay: what former attention counts beside a step's own, 0 … 1.
        maximum: keep the highest of them instead of their sum.

    Raises:
        ConfigError: a decay outside its range.
    """

    needs_attention = True
    every_step = True
    state = MappingProxyType({_SEEN: 0.0})

    decay: float = 0.9
    maximum: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1:
            raise ConfigError(f"decay is {self.decay!r}, but must be a number from 0 to 1", "leave it out for 0.9")

    def score(self, candidates: Candidates) -> torch.Tensor:
        seen = candidates.state[_SEEN].mul_(self.decay)
        if self.maximum:
            return torch.maximum(seen, candidates.attended, out=seen).clone()
        return seen.add_(candidates.attended).clone()
