"""Attention with key scores as the formula reads; everything faster is tested against this file."""

from __future__ import annotations

import torch


def attention_with_key_scores(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition: see `statekv.ops.attention_with_key_scores` for shapes; all arithmetic in float32."""
    streams, heads, queries, dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    grouped = query.float().view(streams, kv_heads, heads // kv_heads, queries, dim)
    logits = scale * torch.einsum("shgqd,shkd->shgqk", grouped, key.float())
    # Query i sits at key keys - queries + i, and sees nothing after itself.
    hidden = torch.ones(queries, keys, dtype=torch.bool, device=query.device).triu(keys - queries + 1)
    probabilities = logits.masked_fill(hidden, float("-inf")).softmax(-1)
    mixed = torch.einsum("shgqk,shkd->shgqd", probabilities, value.float())
    return mixed.reshape(query.shape).to(query.dtype), probabilities.sum((2, 3))
