"""Steps in blocks, brought back to the device for a question."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from itertools import accumulate, groupby

import torch

from statekv.cache.spec import KVSpec, numbers_in
from statekv.cache.tiers.block import SegmentEntry, read_steps
from statekv.errors import StorageError
from statekv.ops.rope import Angles, rotate


class BlockFetcher:
    """Reads steps of one layer, in few copies, and turns their keys to where the steps stand now."""

    def __init__(self, spec: KVSpec, bits: int | None) -> None:
        self.spec = spec
        self.bits = bits
        self.recent = FetchCache(spec, 0, 1)
        self.turned: Angles | None = None  # of how far steps have moved since they were sealed

    def bring(self, layer: int, steps: Sequence[SegmentEntry]) -> torch.Tensor:
        """Keys and values [2, streams, kv_heads, n, head_dim] of all tokens of steps, read anew; a StorageError where a
        block is not as it was written.
        """
        g, found = self.spec, []
        for _, run in groupby(steps, key=lambda step: step.offloaded.on_device):
            spots = [(step.offloaded, step.row) for step in run]
            found.append(read_steps(spots, layer, self.bits, g.devices[layer], g.dtype))
        held = torch.cat(found).permute(1, 2, 3, 0, 4).contiguous()
        if any(step.moved for step in steps):
            assert self.turned is not None
            by = torch.tensor([step.moved for step in steps])
            cos, sin = self.turned(by.repeat_interleave(torch.tensor([step.length for step in steps])))
            held[0] = rotate(held[0].float(), cos.to(held.device)[:, None], sin.to(held.device)[:, None])
        return held

    def can_read(self, step: SegmentEntry) -> bool:
        """Whether a step is as it was written, in all layers."""
        g = self.spec
        try:
            for layer in range(g.layers):
                read_steps([(step.offloaded, step.row)], layer, self.bits, g.devices[layer], g.dtype)
        except StorageError:
            return False
        return True

    def recall(self, layer: int, steps: Sequence[SegmentEntry]) -> torch.Tensor:
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


def _in_order(steps: Sequence[SegmentEntry], held: torch.Tensor) -> torch.Tensor:
    """Tokens [..., n, head_dim] of steps, these one behind another, in the order of the stream."""
    behind = accumulate(step.length for step in steps)
    stops = [stop for _, stop in sorted(zip((step.start for step in steps), behind, strict=True))]
    lengths = [step.length for step in sorted(steps, key=lambda step: step.start)]
    starts = [stop - length for stop, length in zip(stops, lengths, strict=True)]
    return held.index_select(-2, numbers_in(starts, stops).to(held.device))


class FetchCache:
    """Of each layer, least recently used goes first.

    The memory is taken once and stays: steps that come and go one by one would leave holes between whatever else a
    process allocates meanwhile, and a stream of days would grow by them.

    Args:
        cap: bytes that they may take, shared out evenly among the layers.
    """

    def __init__(self, spec: KVSpec, cap: int, longest: int) -> None:
        g = spec
        token = g.streams * g.bytes_per_token // g.layers
        steps = cap // (g.layers * longest * token)
        shape = (2, g.streams, g.kv_heads, steps * longest, g.head_dim)
        self._held = [torch.empty(shape, dtype=g.dtype, device=device) for device in g.devices]
        self._free = [list(range(steps)) for _ in g.devices]
        self._steps: list[OrderedDict[int, tuple[int, int]]] = [OrderedDict() for _ in g.devices]  # place, tokens
        self._longest = longest

    def __len__(self) -> int:
        """Steps, each as often as there are layers that keep it."""
        return sum(map(len, self._steps))

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(held.nbytes for held in self._held)

    def known(self, layer: int, starts: Iterable[int]) -> list[int]:
        """Those of the steps that begin at these tokens which are kept; they have been asked for now."""
        steps = self._steps[layer]
        found = [start for start in starts if start in steps]
        for start in found:
            steps.move_to_end(start)
        return found

    @torch.inference_mode()
    def read(self, layer: int, starts: Iterable[int]) -> torch.Tensor:
        """Of steps that are kept: [2, streams, kv_heads, n, head_dim], one behind another, a copy."""
        return self._held[layer].index_select(-2, self._spots(layer, [self._steps[layer][start] for start in starts]))

    @torch.inference_mode()
    def put(self, layer: int, starts: Sequence[int], lengths: Sequence[int], steps: torch.Tensor) -> None:
        """Keep copies, in the places of what has not been asked for the longest where none is free.

        Args:
            starts, lengths: of steps that are not kept yet, in tokens. No more are kept than there is room for, the
                last ones, and none that is longer than expected.
            steps: [2, streams, kv_heads, n, head_dim], one behind another.
        """
        known, free = self._steps[layer], self._free[layer]
        begins = list(accumulate(lengths, initial=0))
        fit = [number for number, length in enumerate(lengths) if length <= self._longest]
        fit = fit[max(0, len(fit) - len(free) - len(known)) :]
        places = [free.pop() if free else known.popitem(last=False)[1][0] for _ in fit]
        spots = [(place, lengths[number]) for number, place in zip(fit, places, strict=True)]
        known.update(zip((starts[number] for number in fit), spots, strict=True))
        taken = numbers_in([begins[number] for number in fit], [begins[number + 1] for number in fit]).to(steps.device)
        self._held[layer].index_copy_(-2, self._spots(layer, spots), steps.index_select(-2, taken))

    def drop(self, starts: Collection[int]) -> None:
        """Let go of the steps that begin at these tokens."""
        for steps, free in zip(self._steps, self._free, strict=True):
            free += [steps.pop(start)[0] for start in starts if start in steps]

    def clear(self) -> None:
        """Let go of all: they have moved to other positions."""
        for steps in self._steps:
            self.drop(list(steps))

    def _spots(self, layer: int, steps: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Tokens that steps have, int64 on their device."""
        starts = [place * self._longest for place, _ in steps]
        stops = [place * self._longest + length for place, length in steps]
        return numbers_in(starts, stops).to(self._held[layer].device)
