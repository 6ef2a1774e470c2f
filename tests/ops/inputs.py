"""Random queries, keys and values for the tests of attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

import torch

CPU = torch.device("cpu")


class Ways(TypedDict, total=False):
    """How attention is asked for, beside its tensors."""

    lengths: torch.Tensor
    causal: bool
    every: int
    bias: torch.Tensor


@dataclass(frozen=True)
class Shape:
    """Sizes of one call; the keys lie in the front of a buffer of `capacity` slots, as in the caches."""

    streams: int
    kv_heads: int
    group: int
    queries: int
    keys: int
    dim: int

    @property
    def scale(self) -> float:
        return float(self.dim**-0.5)

    def tensors(
        self, dtype: torch.dtype = torch.float32, seed: int = 0, slack: int = 0, device: torch.device = CPU
    ) -> tuple[torch.Tensor, ...]:
        """Query, key and value; with slack, keys and values are slices of a buffer with so many more slots."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*sizes: int) -> torch.Tensor:
            return torch.randn(*sizes, generator=generator).to(device, dtype)

        query = normal(self.streams, self.kv_heads * self.group, self.queries, self.dim)
        buffer = normal(2, self.streams, self.kv_heads, self.keys + slack, self.dim)
        return query, buffer[0, :, :, : self.keys], buffer[1, :, :, : self.keys]

    def bias(self, device: torch.device = CPU) -> torch.Tensor:
        """[streams, kv_heads, K] float32: log weights of keys before the queries' own, some of them of empty slots."""
        drawn = 2 * torch.rand(self.streams, self.kv_heads, self.keys, generator=torch.Generator().manual_seed(3))
        empty = torch.arange(self.keys) % 3 == 1
        drawn = drawn.masked_fill(empty, float("-inf"))
        drawn[..., max(0, self.keys - self.queries - 20) :] = 0  # own keys, also where fewer slots are in use
        return drawn.to(device)

    def lengths(self, device: torch.device = CPU) -> torch.Tensor:
        """[streams] int32: as many slots in use as there may be, and fewer from stream to stream."""
        used = [max(self.queries, self.keys - 1 - 9 * stream) for stream in range(self.streams)]
        return torch.tensor(used, dtype=torch.int32, device=device)


def spoil(tensors: tuple[torch.Tensor, ...], lengths: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same tensors, with NaN in the slots that are not in use."""
    query, key, value = tensors
    unused = (torch.arange(key.shape[2], device=key.device) >= lengths[:, None])[:, None, :, None]
    return query, key.masked_fill(unused, float("nan")), value.masked_fill(unused, float("nan"))


# Q = 1, K = Q, K ≫ Q; groups 1, 2, 7; head sizes 64, 80, 128; one stream and several.
SHAPES = [
    Shape(1, 2, 1, 1, 1, 64),
    Shape(1, 2, 7, 1, 50, 64),
    Shape(1, 2, 2, 24, 24, 80),
    Shape(3, 1, 7, 5, 5, 128),
    Shape(1, 2, 7, 16, 300, 128),
    Shape(2, 4, 2, 9, 77, 80),
    Shape(3, 2, 1, 6, 40, 64),
]
