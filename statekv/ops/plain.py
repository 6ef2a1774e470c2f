"""Causal attention without scores, where the queries are the last of the keys: torch's own kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float) -> torch.Tensor:
    """Attention of the last Q of K positions to themselves and to everything before.

    Args:
        query: [streams, heads, Q, D].
        key, value: [streams, kv_heads, K, D], K ≥ Q.
        scale: factor on the products.

    Returns:
        [streams, heads, Q, D] of the query's dtype.
    """
    queries, keys = query.shape[2], key.shape[2]
    mask = None
    if 1 < queries < keys:
        # `is_causal` aligns to the upper left, which would hide the past: the mask says lower right.
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=1 < queries == keys,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
