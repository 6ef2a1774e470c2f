"""Sizes that every cache of one model shares."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Geometry:
    """Attributes:
    kv_heads, head_dim: of one layer's keys.
    dtype: of keys and values.
    devices: where each layer's keys live; its length is the number of layers.
    streams: streams stepped together.
    """

    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    devices: tuple[torch.device, ...]
    streams: int = 1

    @property
    def layers(self) -> int:
        return len(self.devices)

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of one token in all layers and heads of one stream."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize
