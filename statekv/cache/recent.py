"""Steps that questions have lately brought in from lower tiers, so that the next question need not."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

import torch

from statekv.cache.geometry import Geometry


class Recent:
    """Of each layer, least recently used goes first.

    The memory is taken once and stays: steps that come and go one by one would leave holes between whatever else a
    process allocates meanwhile, and a stream of days would grow by them.

    Args:
        geometry: sizes of the model's keys.
        cap: bytes that they may take, shared out evenly among the layers.
        longest: tokens of the longest step.
    """

    def __init__(self, geometry: Geometry, cap: int, longest: int) -> None:
        g = geometry
        token = g.streams * g.bytes_per_token // g.layers
        shape = (cap // (g.layers * longest * token), 2, g.streams, g.kv_heads, longest, g.head_dim)
        self._held = [torch.empty(shape, dtype=g.dtype, device=device) for device in g.devices]
        self._free = [list(range(shape[0])) for _ in g.devices]
        self._steps: list[OrderedDict[int, tuple[int, int]]] = [OrderedDict() for _ in g.devices]  # place, tokens
        self._longest = longest

    def __len__(self) -> int:
        """Steps, each as often as there are layers that keep it."""
        return sum(map(len, self._steps))

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(held.nbytes for held in self._held)

    def get(self, layer: int, start: int) -> torch.Tensor | None:
        """Of the step that begins at token `start`: [2, streams, kv_heads, n, head_dim], a view that is good until the
        next `put`; None: it has to be fetched."""
        steps = self._steps[layer]
        if start not in steps:
            return None
        steps.move_to_end(start)
        place, tokens = steps[start]
        return self._held[layer][place, ..., :tokens, :]

    @torch.inference_mode()
    def put(self, layer: int, start: int, step: torch.Tensor) -> None:
        """Keep a copy, in the place of what has not been asked for the longest where none is free."""
        steps, free = self._steps[layer], self._free[layer]
        if not (steps or free) or step.shape[-2] > self._longest:
            return
        place = free.pop() if free else steps.popitem(last=False)[1][0]
        self._held[layer][place, ..., : step.shape[-2], :] = step
        steps[start] = place, step.shape[-2]

    def drop(self, starts: Collection[int]) -> None:
        """Let go of the steps that begin at these tokens."""
        for steps, free in zip(self._steps, self._free, strict=True):
            free += [steps.pop(start)[0] for start in starts if start in steps]

    def clear(self) -> None:
        """Let go of all: they have moved to other positions."""
        for steps in self._steps:
            self.drop(list(steps))
