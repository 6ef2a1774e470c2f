"""Steps in blocks, brought back to the device for a question."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch

from statekv.cache.geometry import Geometry
from statekv.cache.passage import Passage
from statekv.cache.recent import Recent
from statekv.cache.sealed import read_steps
from statekv.ops.rope import Angles, rotate


class Bringing:
    """Reads steps of one layer, in few copies, and turns their keys to where the steps stand now.

    Args:
        geometry: sizes of the model's keys.
        bits: of the blocks.
    """

    def __init__(self, geometry: Geometry, bits: int | None) -> None:
        self.geometry = geometry
        self.bits = bits
        self.recent = Recent(geometry, 0, 1)
        self.turned: Angles | None = None  # of how far steps have moved since they were sealed

    def bring(self, layer: int, steps: Sequence[Passage]) -> torch.Tensor:
        """Keys and values [2, streams, kv_heads, n, head_dim] of all tokens of steps, read anew.

        Raises:
            StorageError: a block is not as it was written.
        """
        g, found = self.geometry, []
        for _, run in groupby(steps, key=lambda step: step.sealed.on_device):
            spots = [(step.sealed, step.row) for step in run]
            found.append(read_steps(spots, layer, self.bits, g.devices[layer], g.dtype))
        held = torch.cat(found).permute(1, 2, 3, 0, 4).contiguous()
        if any(step.moved for step in steps):
            assert self.turned is not None
            by = torch.tensor([step.moved for step in steps])
            cos, sin = self.turned(by.repeat_interleave(torch.tensor([step.length for step in steps])))
            held[0] = rotate(held[0].float(), cos.to(held.device)[:, None], sin.to(held.device)[:, None])
        return held

    def recall(self, layer: int, steps: Sequence[Passage]) -> torch.Tensor:
        """As `bring`, by way of what was asked for lately."""
        known = {step.start: self.recent.get(layer, step.start) for step in steps}
        missing = [step for step in steps if known[step.start] is None]
        fresh: dict[int, torch.Tensor] = {}
        if missing:
            parts = self.bring(layer, missing).split([step.length for step in missing], dim=-2)
            fresh = {step.start: tokens for step, tokens in zip(missing, parts, strict=True)}
        found = torch.cat([tokens for tokens in (known | fresh).values() if tokens is not None], dim=-2)
        for start, tokens in fresh.items():  # perhaps into the place of one that has just been found
            self.recent.put(layer, start, tokens)
        return found
