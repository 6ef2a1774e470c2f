"""One representative for each step and layer, made when the step enters, by which a question finds it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from statekv.cache.detailed import DetailedCache
from statekv.cache.geometry import Geometry
from statekv.ops.rope import rotate

_FIRST_CAPACITY = 64  # steps


@dataclass(frozen=True)
class Block:
    """One step in the detailed cache: tokens `start` to `stop`, and how many positions it takes."""

    start: int
    stop: int
    positions: int


class Blocks:
    """The mean key of every step, as it was before rotation, in every layer.

    ReKV (arXiv 2503.00540; Becomebright/ReKV, `kv_cache_manager.py`) compares the mean key of a block with the mean
    query of a question, both without rotation. So does this, although the keys that it reads are rotated: each is
    turned back by its own position before the mean is taken, which is exact but for rounding.

    A mean of rotated keys would not do. Over the positions of one step the fast pairs turn through whole circles and
    cancel each other, and what is left of the slow ones depends on how far the step lies from the question. Without
    rotation the score is about content alone, and choosing is the same whichever positions retrieved keys get.

    Args:
        geometry: sizes of the model's keys.
    """

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.spots: list[Block] = []
        self.means = [self._allocate(layer, 0) for layer in range(geometry.layers)]

    def __len__(self) -> int:
        return len(self.spots)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(means.nbytes for means in self.means)

    def add(self, detailed: DetailedCache, block: Block, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Take note of a step that all layers have just processed.

        Args:
            detailed: holds its keys.
            block: where.
            cos, sin: [streams, T, head_dim] float32, what its keys were turned by.
        """
        for layer, device in enumerate(self.geometry.devices):
            rotated = detailed.keys(layer)[:, :, block.start : block.stop].float()
            keys = rotate(rotated, cos.to(device)[:, None], -sin.to(device)[:, None])
            self._put(layer, keys.mean(-2, keepdim=True))
        self.spots.append(block)

    def scores(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """Product of a mean query with every block's mean key, heads of a group and all groups together.

        Args:
            layer: index of the layer.
            query: [streams, heads, head_dim] float32, before rotation.

        Returns:
            [streams, blocks] float32.
        """
        means = self.means[layer][:, :, : len(self)]  # [streams, kv_heads, blocks, D]
        grouped = query.unflatten(1, (means.shape[1], -1)).sum(2)  # every query head of a group meets the same key
        return torch.einsum("shd,shbd->sb", grouped, means)

    def crop(self, tokens: int) -> None:
        """Forget the blocks that do not lie wholly in the first `tokens` tokens; nothing is copied."""
        while self.spots and self.spots[-1].stop > tokens:
            self.spots.pop()

    def respace(self, positions: list[int]) -> None:
        """Take note of how many positions each step takes from now on."""
        self.spots = [replace(spot, positions=taken) for spot, taken in zip(self.spots, positions, strict=True)]

    def restore(self, spots: list[Block], means: list[torch.Tensor]) -> None:
        """Take over saved blocks: a mean [streams, kv_heads, blocks, head_dim] for each layer."""
        for layer, saved in enumerate(means):
            self._put(layer, saved)
        self.spots = spots

    def fork(self) -> Blocks:
        """A copy."""
        found = Blocks(self.geometry)
        found.restore(list(self.spots), [means[:, :, : len(self)] for means in self.means])
        return found

    def _put(self, layer: int, fresh: torch.Tensor) -> None:
        held, first = self.means[layer], len(self)
        if first + fresh.shape[2] > held.shape[2]:
            held = self._allocate(layer, max(first + fresh.shape[2], 2 * held.shape[2], _FIRST_CAPACITY))
            held[:, :, :first] = self.means[layer][:, :, :first]
            self.means[layer] = held
        held[:, :, first : first + fresh.shape[2]] = fresh

    def _allocate(self, layer: int, blocks: int) -> torch.Tensor:
        g = self.geometry
        return torch.empty(g.streams, g.kv_heads, blocks, g.head_dim, device=g.devices[layer])
