"""The least that a step or an answer can cost: its products at the machine's measured rate, its bytes at memory's."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from statekv.bench.clock import alternate, matmul_rate
from statekv.bench.sizes import Size

_READ_BYTES = 1 << 29  # larger than any processor cache


@dataclass(frozen=True)
class Machine:
    """What was measured of the machine in the same run.

    Attributes:
        flops: per second, in products with a large weight.
        read: bytes per second out of memory.
    """

    flops: float
    read: float

    @classmethod
    def measured(cls, device: torch.device, dtype: torch.dtype) -> Machine:
        """Rates of products in a dtype, and of memory."""
        return cls(matmul_rate(device, dtype), read_rate(device))

    def seconds(self, flops: float, read: float = 0) -> float:
        """Floor of some work, where products and memory run at the same time."""
        return max(flops / self.flops, read / self.read)


@torch.inference_mode()
def read_rate(device: torch.device, count: int = _READ_BYTES, runs: int = 10) -> float:
    """Bytes per second of a sum over `count` bytes of float32: the best of `runs`, for a floor is a floor."""
    data = torch.ones(count // 4, device=device)
    seconds = alternate({"read": lambda: data.sum()}, runs=runs, device=device)["read"]
    return data.nbytes / min(seconds)


def segment_flops(size: Size, tokens: int, past: int) -> int:
    """FLOPs of `tokens` tokens behind `past` visible ones: projections and attention; norms and softmax not counted."""
    pairs = tokens * past + tokens * (tokens + 1) // 2  # of a query and a key that it sees
    return 2 * size.parameters * tokens + 4 * size.layers * size.heads * size.head_dim * pairs


def head_flops(size: Size) -> int:
    """FLOPs of the logits of one token."""
    return 2 * size.vocab * size.hidden


def answer_bytes(size: Size, past: int, dtype: torch.dtype) -> int:
    """What must be read for one token of an answer behind `past` others: all weights, all keys and values."""
    weights = (size.parameters + size.vocab * size.hidden) * dtype.itemsize
    return weights + past * size.kv_bytes_per_token(dtype)
