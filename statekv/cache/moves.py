"""Tokens by their numbers in the stream: which ones, and how far they move when it is compacted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Moves:
    """Steps move as a whole, so a token moves as far as the last step that begins at it or before.

    Attributes:
        starts: number of each moving step's first token in the stream, ascending.
        by: positions that it moves by.
    """

    starts: Sequence[int]
    by: Sequence[int]

    def of(self, tokens: torch.Tensor) -> torch.Tensor:
        """How far tokens move, int64 and of their shape, on the CPU; what lies before the first start stays."""
        step = torch.searchsorted(torch.tensor(self.starts), tokens.cpu().long(), right=True)
        return torch.tensor([0, *self.by])[step]


def numbers_in(starts: Sequence[int], stops: Sequence[int]) -> torch.Tensor:
    """Numbers from each start to its stop, one range behind another, int64 on the CPU."""
    first = torch.tensor(starts, dtype=torch.int64)
    lengths = torch.tensor(stops, dtype=torch.int64) - first
    shift = first - (lengths.cumsum(0) - lengths)  # what is added to a count over all ranges
    return torch.arange(int(lengths.sum())) + shift.repeat_interleave(lengths)
