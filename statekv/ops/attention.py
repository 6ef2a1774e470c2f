"""Causal attention without scores, where the queries are the last of the keys: the fastest exact kernel there is.

Exact attention over keys that come in pieces, of which one at a time is in memory.

A softmax over all keys is that over each piece, weighted by the sum of exponentials of the piece. Kernels hand out the
logarithm of that sum beside the mixed values, as for flash-decoding and ring attention.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable

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
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of the last Q of K positions to themselves and to everything before.

    On CUDA in half precision that is flash-attn where it is installed, else the same kernel as torch carries it; a CPU
    uses torch's. None of them writes keys or values out once more for the heads of a group.

    Args:
        query: [streams, heads, Q, D].
        key, value: [streams, kv_heads, K, D], K ≥ Q.
        scale: factor on the products.
        hidden: [streams, kv_heads, n] bool, which of the first n keys nobody sees; None: none of them.
        bias: [streams, kv_heads, K] float32, added to every logit of a key, see `statekv.ops`; None: all 0.

    Returns:
        [streams, heads, Q, D] of the query's dtype.
    """
    if bias is not None:
        return _with_bias(query, key, value, bias, scale=scale)
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
        query, key, value, attn_mask=mask, is_causal=queries == keys, scale=scale, enable_gqa=heads != kv_heads
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


def _with_bias(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """As `attention`, with something added to each head's logits, which rules the flash kernels out."""
    (heads, queries), (kv_heads, keys) = query.shape[1:3], key.shape[1:3]
    later = torch.ones(queries, keys, dtype=torch.bool, device=query.device).triu(keys - queries + 1)
    by_head = bias.to(query.dtype).repeat_interleave(heads // kv_heads, dim=1)[:, :, None]
    mask = by_head.masked_fill(later, float("-inf"))  # [streams, heads, Q, K]
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


Part = tuple[torch.Tensor, torch.Tensor]  # mixed values [S, H, Q, D]; log of the sum of exponentials [S, H, Q] float32


def attention_over(
    query: torch.Tensor,
    past: Iterable[tuple[torch.Tensor, torch.Tensor]],
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
) -> torch.Tensor:
    """As `attention` to all pieces one behind the other, with `key` and `value` behind them.

    Pieces are mixed in the query's dtype and joined in float32, each before the next one is asked for; their order
    matters by rounding only. Without pieces this is `attention` itself.

    Args:
        query: [streams, heads, Q, D].
        past: keys and values [streams, kv_heads, n, D] of each piece, n ≥ 1, which all queries see.
        key, value: [streams, kv_heads, K, D], K ≥ Q, the newest keys; the queries are the last Q of them.
        scale: factor on the products.

    Returns:
        [streams, heads, Q, D] of the query's dtype.
    """
    joined: Part | None = None
    for keys, values in past:
        joined = _joined(joined, _part(query, keys, values, scale=scale))
        del keys, values  # or they would wait here while the next piece is fetched
    if joined is None:
        return attention(query, key, value, scale=scale)
    older = key.shape[2] - query.shape[2]
    if older:
        joined = _joined(joined, _part(query, key[:, :, :older], value[:, :, :older], scale=scale))
    own = _part(query, key[:, :, older:], value[:, :, older:], scale=scale, causal=True)
    return _joined(joined, own)[0].to(query.dtype)


def with_cpu_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float, causal: bool = False
) -> Part:
    """One piece by torch's flash attention for CPUs; causal where the keys are those of the queries."""
    (streams, heads, queries, dim), kv_heads = query.shape, key.shape[1]
    rows = query.reshape(streams, kv_heads, -1, dim)  # the group's queries are rows that read each key once
    mask: torch.Tensor | None = None
    if causal and queries > 1:
        mask = query.new_full((queries, queries), float("-inf")).triu(1).repeat(heads // kv_heads, 1)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    mixed, logs = kernel(rows, key, value, attn_mask=mask, scale=scale)
    return mixed.reshape(query.shape), logs.reshape(query.shape[:3])


def with_cuda_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float, causal: bool = False
) -> Part:
    """One piece by torch's flash attention for GPUs, which knows groups of heads."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention
    mixed, logs, *_ = kernel(query, key, value, is_causal=causal, scale=scale)
    return mixed, logs


def with_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float, causal: bool = False
) -> Part:
    """One piece with all products in memory, in float32: wherever there is no kernel."""
    (streams, _, queries, dim), kv_heads = query.shape, key.shape[1]
    rows = query.reshape(streams, kv_heads, -1, dim).float()
    logits = (rows @ key.float().transpose(2, 3) * scale).view(streams, kv_heads, -1, queries, key.shape[2])
    if causal:
        later = torch.ones(queries, queries, dtype=torch.bool, device=query.device).triu(1)
        logits = logits.masked_fill(later, float("-inf"))
    mixed = logits.softmax(-1).flatten(2, 3) @ value.float()
    return mixed.view(query.shape), logits.logsumexp(-1).view(query.shape[:3])


def _part(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float, causal: bool = False) -> Part:
    half, dim = query.dtype in (torch.float16, torch.bfloat16), query.shape[-1]
    if query.device.type == "cpu":
        return with_cpu_kernel(query, key, value, scale=scale, causal=causal)
    if query.is_cuda and half and dim <= 256 and dim % 8 == 0:
        return with_cuda_kernel(query, key, value, scale=scale, causal=causal)
    return with_products(query, key, value, scale=scale, causal=causal)


def _joined(joined: Part | None, part: Part) -> Part:
    mixed, logs = part
    if joined is None:
        return mixed.float(), logs
    total = torch.logaddexp(joined[1], logs)
    # [S, H, Q, 1] each: what the keys so far, and those of this piece, weigh among all of them.
    before, now = ((each - total).exp()[..., None] for each in (joined[1], logs))
    return joined[0] * before + mixed.float() * now, total
