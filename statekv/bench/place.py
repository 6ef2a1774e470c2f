"""Where and in what a benchmark runs, from two words of the command line."""

from __future__ import annotations

import torch

from statekv.errors import ConfigError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def place(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """A device that is there and a dtype.

    Args:
        device: auto takes CUDA where there is one, else the CPU.
        dtype: auto takes bfloat16 on CUDA and float32 on a CPU.

    Raises:
        ConfigError: an unknown dtype, or a device that is not there.
    """
    name = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(name)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} is not to be had: {str(error).splitlines()[0]}", "use cpu") from None
    if dtype == "auto":
        return found, torch.bfloat16 if found.type == "cuda" else torch.float32
    if dtype not in _DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}", f"known: auto, {', '.join(_DTYPES)}")
    return found, _DTYPES[dtype]
