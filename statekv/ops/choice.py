"""Which implementation of attention with key scores runs: asked for by name, or the fastest that can."""

from __future__ import annotations

import functools
import os
import shutil
import warnings

import torch

from statekv.errors import ConfigError, SpeedWarning

IMPLEMENTATIONS = ("naive", "blocked", "triton")
VARIABLE = "STATEKV_ATTENTION"


def implementation(
    impl: str = "auto",
    device: torch.device | None = None,
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
) -> str:
    """Name of the implementation that `impl` stands for.

    An `auto` that the environment variable STATEKV_ATTENTION leaves open is `triton` on a GPU that can, else `blocked`;
    a GPU that cannot says why, once per reason.

    Args:
        impl: auto, or one of IMPLEMENTATIONS.
        device: where the tensors are; None: the GPU if there is one.
        dtype, head_dim: of the queries.

    Raises:
        ConfigError: an unknown name, or a forced implementation that cannot run.
    """
    asked, by = impl, "kernel"
    if impl == "auto":
        asked, by = os.environ.get(VARIABLE) or "auto", VARIABLE
    if asked not in ("auto", *IMPLEMENTATIONS):
        raise ConfigError(f"unknown {by} {asked!r}", f"known: auto, {', '.join(IMPLEMENTATIONS)}")
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if asked not in ("auto", "triton") or (asked == "auto" and device.type != "cuda"):
        return "blocked" if asked == "auto" else asked
    obstacle = _obstacle(device, dtype, head_dim)
    if obstacle is None:
        return "triton"
    reason, way_out = obstacle
    if asked == "triton":
        raise ConfigError(f"{by} is 'triton', but {reason}", f"{way_out}, or choose auto or blocked")
    _announce(reason, way_out)
    return "blocked"


@functools.cache
def _announce(reason: str, way_out: str) -> None:
    warnings.warn(f"attention with key scores falls back to 'blocked': {reason} ({way_out})", SpeedWarning, 2)


@functools.cache
def _obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, str] | None:
    """Why the kernels in `flash` cannot run, and what would help; None where they can."""
    try:
        from statekv.ops import flash
    except ImportError as error:
        return f"the package triton does not load: {error}", "pip install 'statekv[gpu]'"
    if device.type == "cuda" and flash.INTERPRETED:
        return "TRITON_INTERPRET is set, which is for CPUs", "unset TRITON_INTERPRET"
    if device.type != "cuda" and not flash.INTERPRETED:
        return f"it is for GPUs and the tensors are on {device.type}", "set TRITON_INTERPRET=1 to interpret it, slowly"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < flash.OLDEST_GPU:
        return f"it needs an NVIDIA GPU of generation {_dotted(flash.OLDEST_GPU)}", "use a newer GPU"
    if device.type == "cuda" and not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton finds no C compiler, which it launches kernels with", "install gcc, or set CC"
    if dtype not in flash.DTYPES:
        known = ", ".join(str(known).removeprefix("torch.") for known in flash.DTYPES)
        return f"it takes {known}, not {str(dtype).removeprefix('torch.')}", "load the model in one of them"
    if head_dim > flash.LARGEST_HEAD:
        return f"it takes heads of up to {flash.LARGEST_HEAD}, not {head_dim}", "use another model"
    return None


def _dotted(generation: tuple[int, int]) -> str:
    return ".".join(map(str, generation))
