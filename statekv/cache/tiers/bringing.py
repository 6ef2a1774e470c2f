"""Steps in blocks, brought back to the device for a question."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby

import torch

from statekv.cache.geometry import Geometry
from statekv.cache.moves import numbers_in
from statekv.cache.tiers.passage import Passage
from statekv.cache.tiers.recent import Recent
from statekv.cache.tiers.sealed import read_steps
from statekv.errors import StorageError
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

    def can_read(self, step: Passage) -> bool:
        """Whether a step is as it was written, in all layers."""
        g = self.geometry
        try:
            for layer in range(g.layers):
                read_steps([(step.sealed, step.row)], layer, self.bits, g.devices[layer], g.dtype)
        except StorageError:
            return False
        return True

    def recall(self, layer: int, steps: Sequence[Passage]) -> torch.Tensor:
        """As `bring`, of steps in the order of the stream, by way of what was asked for lately."""
        known = set(self.recent.known(layer, [step.start for step in steps]))
        here = [step for step in steps if step.start in known]
        missing = [step for step in steps if step.start not in known]
        kept = self.recent.read(layer, [step.start for step in here])
        if not missing:
            return kept
        fresh = self.bring(layer, missing)
        self.recent.put(layer, [step.start for step in missing], [step.length for step in missing], fresh)
        return _in_order([*here, *missing], torch.cat([kept, fresh], dim=-2)) if here else fresh


def _in_order(steps: Sequence[Passage], held: torch.Tensor) -> torch.Tensor:
    """Tokens [..., n, head_dim] of steps, these one behind another, in the order of the stream."""
    behind = accumulate(step.length for step in steps)
    stops = [stop for _, stop in sorted(zip((step.start for step in steps), behind, strict=True))]
    lengths = [step.length for step in sorted(steps, key=lambda step: step.start)]
    starts = [stop - length for stop, length in zip(stops, lengths, strict=True)]
    return held.index_select(-2, numbers_in(starts, stops).to(held.device))
