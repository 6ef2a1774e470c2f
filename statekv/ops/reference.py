"""Attention with key scores as the formula reads; everything faster is tested against this file."""

from __future__ import annotations

import torch


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition: see `statekv.ops.attention_with_key_scores` for shapes; all arithmetic in float32."""
    streams, heads, queries, dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    grouped = query.float().view(streams, kv_heads, heads // kv_heads, queries, dim)
    logits = scale * torch.einsum("shgqd,shkd->shgqk", grouped, key.float())
    if bias is not None:
        logits = logits + bias[:, :, None, None]
    # Query i sits at slot used - queries + i, and sees nothing after itself.
    used = torch.full((streams,), keys, device=query.device) if lengths is None else lengths
    behind = torch.arange(queries - 1, -1, -1, device=query.device) if causal else 0
    last_seen = used[:, None] - 1 - behind  # [S, Q], or [S, 1] where all see the same
    slot = torch.arange(keys, device=query.device)
    hidden = slot > last_seen[:, :, None]  # [S, Q or 1, K]
    probabilities = logits.masked_fill(hidden[:, None, None], float("-inf")).softmax(-1)
    # A slot that is not in use may hold NaN, which would survive a probability of 0.
    unused = slot >= used[:, None]  # [S, K]
    mixed = torch.einsum("shgqk,shkd->shgqd", probabilities, value.float().masked_fill(unused[:, None, :, None], 0))
    scored = probabilities[:, :, :, (queries - 1) % every :: every]  # the last query is always among them
    return mixed.reshape(query.shape).to(query.dtype), scored.sum((2, 3))
