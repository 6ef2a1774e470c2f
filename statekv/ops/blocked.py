"""Attention with key scores for CPUs: whole softmax rows in blocks that stay in the second-level cache."""

from __future__ import annotations

import torch

_BLOCK_BYTES = 1 << 20  # of float32 probabilities: half of a usual second-level cache


def attention_with_key_scores(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `naive`, with never more than a block of probabilities in memory; see `statekv.ops` for shapes."""
    streams, heads, queries, dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    rows = heads // kv_heads * queries  # the group's queries stack up as rows of one matrix
    stacked = query.reshape(streams * kv_heads, rows, dim)
    key, value = key.reshape(-1, keys, dim), value.reshape(-1, keys, dim)
    mixed = torch.empty_like(stacked)
    scores = torch.zeros(streams * kv_heads, keys, device=query.device)
    hidden = torch.ones(queries, queries, dtype=torch.bool, device=query.device).triu(1).repeat(heads // kv_heads, 1)
    fit = max(1, _BLOCK_BYTES // (4 * keys))  # rows of a block
    some_heads, some_rows = max(1, fit // rows), min(fit, rows)
    for h in range(0, streams * kv_heads, some_heads):
        head = slice(h, h + some_heads)
        # Products are taken in float32: large logits that cancel in the softmax would lose their differences.
        transposed, mixable = key[head].float().transpose(1, 2), value[head].float()  # [h, D, K], [h, K, D]
        for r in range(0, rows, some_rows):
            row = slice(r, r + some_rows)
            logits = torch.bmm(stacked[head, row].float(), transposed)  # [h, r, K]
            logits.mul_(scale)[..., keys - queries :].masked_fill_(hidden[row], float("-inf"))
            probabilities = torch.softmax(logits, -1)
            scores[head] += probabilities.sum(1)
            mixed[head, row] = torch.bmm(probabilities, mixable).to(mixed.dtype)
    return mixed.view(query.shape), scores.view(streams, kv_heads, keys)
