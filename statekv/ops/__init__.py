"""Tensors in, tensors out: attention with key scores, selection of keys, rotary frequencies."""

from __future__ import annotations

import functools
import os
import shutil
import warnings
from collections.abc import Callable

import torch

from statekv.errors import ConfigError, SpeedWarning, need
from statekv.ops import cpu, reference

__all__ = ["IMPLEMENTATIONS", "attention_with_key_scores", "implementation"]


def attention_with_key_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    lengths: torch.Tensor | None = None,
    causal: bool = True,
    every: int = 1,
    bias: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prefix-causal attention that also says how much attention every key received (StateKV, section 3).

    The queries are the last Q of the keys in use: all of them see the keys before, and each sees the own keys up to
    itself. `score[j] = Σ over queries and the group's heads of softmax_j(scale · <q, k_j>)`.

    Args:
        query: [streams, heads, Q, D].
        key, value: [streams, kv_heads, K, D]; heads is a multiple of kv_heads, K ≥ Q. They may be views into larger
            buffers; only the last dimension must be dense.
        scale: factor on the products, above 0; usually D ** -0.5.
        lengths: [streams] int32 on the tensors' device: how many slots hold keys, own keys included and last among
            them. The slots behind are never attended, whatever they hold, and score 0. None: all K.
        causal: False lets every query see all keys in use.
        every: score with the queries Q - 1, Q - 1 - every, … only, unscaled. The mixed values stay exact; the scores
            sum to fewer queries. 1 is the definition.
        bias: [streams, kv_heads, K] float32, what is added to every logit of a key: the logarithm of how many keys it
            stands for, -inf where a slot holds none. At least one key that a query sees is above -inf. None: all 0.
        impl: auto, or one of IMPLEMENTATIONS by name; see `implementation`.

    Returns:
        The mixed values [streams, heads, Q, D] in the query's dtype, and the key scores [streams, kv_heads, K] in
        float32, which sum to Q · heads / kv_heads.

    Raises:
        ConfigError: an unknown implementation, or one that cannot run on such tensors.
    """
    name = implementation(impl, query.device, query.dtype, query.shape[-1])
    return _named(name)(query, key, value, scale=scale, lengths=lengths, causal=causal, every=every, bias=bias)


def _named(name: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    if name == "triton":
        from statekv.ops import triton

        return triton.attention_with_key_scores
    return reference.attention_with_key_scores if name == "naive" else cpu.attention_with_key_scores


IMPLEMENTATIONS = ("naive", "blocked", "triton")
VARIABLE = "STATEKV_ATTENTION"


def implementation(
    impl: str = "auto", device: torch.device | None = None, dtype: torch.dtype = torch.bfloat16, head_dim: int = 128
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
    """Why the Triton kernels cannot run, and what would help; None where they can."""
    try:
        with need("triton", "gpu"):
            from statekv.ops import triton
    except ConfigError as error:
        return error.message, error.hint
    if device.type == "cuda" and triton.INTERPRETED:
        return "TRITON_INTERPRET is set, which is for CPUs", "unset TRITON_INTERPRET"
    if device.type != "cuda" and not triton.INTERPRETED:
        return f"it is for GPUs and the tensors are on {device.type}", "set TRITON_INTERPRET=1 to interpret it, slowly"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < triton.OLDEST_GPU:
        oldest = ".".join(map(str, triton.OLDEST_GPU))
        return f"it needs an NVIDIA GPU of generation {oldest}", "use a newer GPU"
    if device.type == "cuda" and not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton finds no C compiler, which it launches kernels with", "install gcc, or set CC"
    if dtype not in triton.DTYPES:
        known = ", ".join(str(known).removeprefix("torch.") for known in triton.DTYPES)
        return f"it takes {known}, not {str(dtype).removeprefix('torch.')}", "load the model in one of them"
    if head_dim > triton.LARGEST_HEAD:
        return f"it takes heads of up to {triton.LARGEST_HEAD}, not {head_dim}", "use another model"
    return None
