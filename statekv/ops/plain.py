"""Causal attention without scores, where the queries are the last of the keys: the fastest exact kernel there is."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from statekv.errors import SpeedWarning

FlashAttention = Callable[..., torch.Tensor]


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    hidden: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of the last Q of K positions to themselves and to everything before.

    On CUDA in half precision that is flash-attn where it is installed, else the same kernel as torch carries it; a CPU
    uses torch's. None of them writes keys or values out once more for the heads of a group.

    Args:
        query: [streams, heads, Q, D].
        key, value: [streams, kv_heads, K, D], K ≥ Q.
        scale: factor on the products.
        hidden: [streams, kv_heads, n] bool, which of the first n keys nobody sees; None: none of them.

    Returns:
        [streams, heads, Q, D] of the query's dtype.
    """
    if hidden is not None:
        return _with_hidden(query, key, value, hidden, scale=scale)
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= 256:
        flash = flash_attention()
        if flash is not None:
            return with_flash_attention(flash, query, key, value, scale=scale)
    return with_torch(query, key, value, scale=scale)


def with_torch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float) -> torch.Tensor:
    """As `attention`, by `scaled_dot_product_attention`."""
    streams, heads, queries, dim = query.shape
    kv_heads, keys = key.shape[1:3]
    if queries == 1:
        # A single token sees everything: the heads of a group are rows that read each key once.
        rows = query.reshape(streams, kv_heads, heads // kv_heads, dim)
        return F.scaled_dot_product_attention(rows, key, value, scale=scale).reshape(query.shape)
    mask: torch.Tensor | None = None
    if queries < keys:
        # `is_causal` aligns to the upper left, which would hide the past. On CUDA a mask that is spelled out would keep
        # the flash kernel away, which knows the lower right by itself.
        if query.is_cuda:
            mask = causal_lower_right(queries, keys)
        else:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=queries == keys,
        scale=scale,
        enable_gqa=heads != kv_heads,
    )


def _with_hidden(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, hidden: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """As `attention`, with a mask for each head, which rules the flash kernels out."""
    (heads, queries), (kv_heads, keys) = query.shape[1:3], key.shape[1:3]
    causal = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    shown = F.pad(~hidden, (0, keys - hidden.shape[-1]), value=True).repeat_interleave(heads // kv_heads, dim=1)
    mask = shown[:, :, None] & causal  # [streams, heads, Q, K]
    grouped = heads != kv_heads
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)


def with_flash_attention(
    flash: FlashAttention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """As `attention`, by flash-attn's `flash_attn_func`: tokens before heads, causal means lower right."""
    tokens_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return flash(*tokens_first, softmax_scale=scale, causal=True).transpose(1, 2)


@functools.cache
def flash_attention() -> FlashAttention | None:
    """flash-attn's function where the package is installed and loads."""
    try:
        from flash_attn import flash_attn_func
    except ModuleNotFoundError:
        return None
    except ImportError as error:
        warnings.warn(SpeedWarning(f"flash-attn is installed but does not load: {error}"), stacklevel=2)
        return None
    found: FlashAttention = flash_attn_func
    return found
