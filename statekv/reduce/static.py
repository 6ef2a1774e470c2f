"""Leave out what has not changed: tokens that look like the last one that went on from the same place.

Differential token drop of TimeChat-Online (arXiv 2504.17343), at the level of features: a token is redundant
if the cosine similarity to its place in the past is above a threshold. There a token is compared with the frame before
it, so that a slow change may pass unseen frame by frame; here with the last token of its place that went on, so that
what is left out never differs from what stands for it by more than the threshold.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from statekv.errors import ConfigError
from statekv.models.encoded import EncodedStep
from statekv.reduce.base import Memory, Reducer


@dataclass(frozen=True)
class Static(Reducer):
    """Keep the tokens that have moved.

    A picture of another grid than the one before it goes on whole. Of a picture in which nothing has moved, the token
    that moved most goes on: every step has one.

    Attributes:
        threshold: cosine distance from the last token that went on from the same place, 0 … 2: what is not above it is
            left out; 0 leaves out nothing, not even what is equal.
    """

    threshold: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 2:
            raise ConfigError(f"threshold is {self.threshold}, but must be a cosine distance from 0 to 2", "try 0.1")

    def reduce(self, step: EncodedStep, memory: Memory) -> EncodedStep:
        if not self.threshold:
            return step
        last: torch.Tensor | None = memory.get("last")  # [rows · columns, hidden]
        if last is None or memory["grid"] != list(step.grid):
            memory["last"], memory["grid"] = step.features, list(step.grid)
            return step
        last = last.to(step.features)
        similarity = torch.cosine_similarity(step.features.float(), last.float(), dim=-1)  # [n]
        moved = 1 - similarity > self.threshold
        moved[similarity.argmin()] = True
        memory["last"] = torch.where(moved[:, None], step.features, last)
        return step.keep(moved)
