"""Memory of all layers in one piece per device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def one_block(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, devices: Sequence[torch.device]
) -> list[torch.Tensor]:
    """Uninitialised tensors, one for each shape, which lie one behind another in a single block of their device.

    Args:
        shapes: of each layer's tensor.
        dtype: of all.
        devices: of each layer.
    """
    sizes = [math.prod(shape) for shape in shapes]
    blocks = {
        device: torch.empty(
            sum(n for n, d in zip(sizes, devices, strict=True) if d == device), dtype=dtype, device=device
        )
        for device in dict.fromkeys(devices)
    }
    taken = dict.fromkeys(blocks, 0)
    tensors = []
    for shape, size, device in zip(shapes, sizes, devices, strict=True):
        tensors.append(blocks[device][taken[device] : taken[device] + size].view(shape))
        taken[device] += size
    return tensors
