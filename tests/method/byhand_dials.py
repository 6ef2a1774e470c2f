"""The dials of carry="attention" by hand: tokens are numbers, scores floats, a sample is drawn from all tokens.

Like tests/byhand.py it shares no line with the library.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.method.byhand import ByHand, Piece

_WORD = 2**64 - 1


class ByHandDials(ByHand):
    """A language model stepped by hand, whose first piece is the prefix and whose others are steps.

    Args:
        arguments: of `ByHand`.
        decay, value_norms, pin_newest, coverage: as in `Config`.
        layer_slope: likewise; one that leaves every layer a whole number of keys.
        seed: of the sample.
    """

    def __init__(
        self,
        *arguments: Any,
        decay: float = 0.0,
        value_norms: bool = False,
        layer_slope: float = 0.0,
        pin_newest: int = 0,
        coverage: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(*arguments)
        self.decay, self.value_norms = decay, value_norms
        last = len(self.memory) - 1
        line = [self.budget * (1 + layer_slope - 2 * layer_slope * layer / last) for layer in range(last + 1)]
        self.budgets = [round(share) for share in line]
        assert line == pytest.approx(self.budgets)
        self.pin_newest, self.coverage, self.seed = pin_newest, coverage, seed
        self.starts: list[int] = []  # first token of each step
        self.totals: dict[tuple[int, int], dict[int, float]] = {}  # of each layer and head, by token

    def step(self, piece: Piece) -> torch.Tensor:
        seen = len(self.memory[0][0].all_keys)
        if seen:
            self.starts.append(seen)
        return super().step(piece)

    def _evict(self, layer: int, h: int, scores: torch.Tensor) -> None:
        head, budget = self.memory[layer][h], self.budgets[layer]
        former = self.totals.get((layer, h), {})
        now = zip(head.born, scores.tolist(), strict=True)
        total = {token: score + self.decay * former.get(token, 0.0) for token, score in now}
        if len(head.born) > budget:
            worth = dict(total)
            if self.value_norms:
                for token, value in zip(head.born, head.values, strict=True):
                    worth[token] *= math.sqrt(sum(x * x for x in value.tolist()))
            sure = self._sample(layer, h, round(self.coverage * budget)) | self._newest(layer)
            assert sure <= set(head.born)
            free = sorted(set(head.born) - sure, key=lambda token: -worth[token])
            kept = sure | set(free[: budget - len(sure)])
            head.keep_only([j for j, token in enumerate(head.born) if token in kept])
        self.totals[layer, h] = {token: total[token] for token in head.born}

    def _newest(self, layer: int) -> set[int]:
        """Tokens of the newest steps, the one that has just been attended among them."""
        steps = self.starts[-self.pin_newest :] if self.pin_newest else []
        return set(range(steps[0], len(self.memory[layer][0].all_keys))) if steps else set()

    def _sample(self, layer: int, h: int, size: int) -> set[int]:
        """The tokens of the whole stream with the highest lots."""
        tokens = range(len(self.memory[layer][h].all_keys))
        return set(sorted(tokens, key=lambda token: -lot(token, layer, h, self.seed))[:size])


def lot(token: int, layer: int, h: int, seed: int) -> int:
    """splitmix64 of what tells one token, layer, head and seed from another."""
    bits = (token + (h << 34)) ^ ((layer * 0x9E3779B1 + seed * 0x85EBCA77) % 2**62)
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB & _WORD
    return bits >> 11
