"""Chance decides among keys of like attention, so that none is lost for being just below the line every time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from statekv.cache.policies.base import Candidates, Policy
from statekv.cache.policies.random import lots
from statekv.errors import ConfigError


@dataclass(frozen=True)
class Stochastic(Policy):
    """A sample without replacement, a key's odds being its attention to the power of 1 / temperature.

    Drawn by the Gumbel trick: log a / temperature - log(-log u), the highest stay. The lots u come from the tokens'
    numbers, the layer, the head and the step, so that a fork, a restored stream and a batch draw the same. At
    temperature 0 it is the paper's rule. VaSE (arXiv 2606.03928) evicts at random too, besides what it protects.

    Attributes:
        temperature: 0 or more; 1 draws in proportion to the attention.
        seed: of the lots; None: the configuration's.

    Raises:
        ConfigError: a temperature outside its range.
    """

    needs_attention = True

    temperature: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            rule = f"temperature is {self.temperature!r}, but must be a number of at least 0"
            raise ConfigError(rule, "leave it out for 1")

    def score(self, candidates: Candidates) -> torch.Tensor:
        if not self.temperature:
            return candidates.attended
        lot = lots(candidates.token_ids, self.seed or 0, candidates.layer, candidates.first_own)
        gumbel = -(-lot.clamp(1e-12, 1 - 1e-12).log()).log()
        return candidates.attended.double().clamp_min(1e-30).log() / self.temperature + gumbel
