"""Reducers of a user's own, as his file would hold them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from statekv.models.encoded import EncodedStep
from statekv.reduce.base import Memory, Reducer


@dataclass(frozen=True)
class Rotating(Reducer):
    """Leaves out every `by`-th token, another one at each step, and adds the step before it to what stays.

    What it makes of a step depends on all steps before it, so that nothing of its memory may be lost.
    """

    by: int = 2

    def reduce(self, step: EncodedStep, memory: Memory) -> EncodedStep:
        count = memory.get("count", 0)
        before = memory.setdefault("sum", torch.zeros_like(step.features))
        step.features.add_(0.1 * before)  # it is a copy
        before.mul_(0.5).add_(step.features)  # so is this
        memory["count"] = count + 1
        places = torch.arange(len(step.features))
        return step.keep((places + count) % self.by != 0)


@dataclass(frozen=True)
class Everything(Reducer):
    """Leaves out nothing, and says so token by token."""

    def reduce(self, step: EncodedStep, memory: Memory) -> EncodedStep:
        return EncodedStep(step.frames, step.features, step.grid, step.deepstack, torch.arange(step.total))
