"""Where and in what a benchmark runs, from two words of the command line."""

from __future__ import annotations

import torch

from statekv.models.loading import read_device, read_dtype


def place(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """A device that is there and a dtype.

    Args:
        device: auto takes CUDA where there is one, else the CPU.
        dtype: auto takes bfloat16 on CUDA and float32 on a CPU.

    Raises:
        ConfigError: an unknown dtype, or a device that is not there.
    """
    found, kind = read_device(device), read_dtype(dtype)
    if not isinstance(kind, torch.dtype):
        kind = torch.bfloat16 if found.type == "cuda" else torch.float32
    return found, kind
