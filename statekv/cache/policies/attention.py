"""StateKV's own rule: the keys that the step attended to most."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from statekv.cache.policies.base import Candidates, Policy


@dataclass(frozen=True)
class Attention(Policy):
    """The attention that a key receives from the step's queries (StateKV, arXiv 2605.31598, section 3)."""

    needs_attention = True

    def score(self, candidates: Candidates) -> torch.Tensor:
        return candidates.attended
