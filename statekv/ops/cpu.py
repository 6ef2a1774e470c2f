"""Attention with key scores for CPUs: whole softmax rows in blocks that stay in the second-level cache.

Taking the log-sum-exp from torch's flash attention and the products a second time costs 1.6 to 1.8 times as much: a
block of probabilities at hand gives mixed values and scores alike (docs/log/speed.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

# Of float32 probabilities: a usual second-level cache for each thread of a CPU; on a GPU that has to make do with this
# file, enough to keep it busy.
_BLOCK_BYTES = {"cpu": 1 << 21, "cuda": 1 << 28}


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
    """As `naive`, with never more than a block of probabilities in memory; see `statekv.ops` for shapes."""
    streams, heads, queries, dim = query.shape
    kv_heads, keys, group = key.shape[1], key.shape[2], heads // key.shape[1]
    if lengths is not None:
        if query.device.type == "cpu" and (longest := int(lengths.max())) == int(lengths.min()):  # free to read here
            key, value = key[:, :, :longest], value[:, :, :longest]
            bias = None if bias is None else bias[..., :longest]
            mixed, scores = attention_with_key_scores(
                query, key, value, scale=scale, causal=causal, every=every, bias=bias
            )
            return mixed, F.pad(scores, (0, keys - longest))
        # A slot that is not in use may hold NaN, which would survive a probability of 0.
        unused = torch.arange(keys, device=query.device) >= lengths[:, None]  # [S, K]
        value = value.masked_fill(unused[:, None, :, None], 0)
    hidden = _hidden(queries, keys, lengths, causal, query.device)
    rows, pairs = group * queries, streams * kv_heads  # the group's queries stack up as rows of one matrix
    hidden = None if hidden is None else hidden.repeat(1, group, 1)  # [1 or S, rows, the last slots]
    behind = torch.arange(queries - 1, -1, -1, device=query.device)
    counted = (behind % every == 0).float().repeat(group)
    stacked = query.reshape(pairs, rows, dim)
    key, value = key.reshape(pairs, keys, dim), value.reshape(pairs, keys, dim)
    mixed = torch.empty_like(stacked)
    scores = torch.zeros(pairs, keys, device=query.device)
    some_heads, some_rows = _block(pairs, rows, keys, query.device)
    block = torch.empty(some_heads * some_rows * keys, device=query.device)
    for h in range(0, pairs, some_heads):
        head = slice(h, min(h + some_heads, pairs))
        # Products are taken in float32: large logits that cancel in the softmax would lose their differences.
        transposed, mixable = key[head].float().transpose(1, 2), value[head].float()  # [h, D, K], [h, K, D]
        for r in range(0, rows, some_rows):
            row = slice(r, min(r + some_rows, rows))
            asking = stacked[head, row].float()
            shape = (*asking.shape[:2], keys)
            logits = block[: shape[0] * shape[1] * keys].view(shape)  # [h, r, K]
            added = logits if bias is None else bias.reshape(pairs, 1, keys)[head]
            torch.baddbmm(added, asking, transposed, beta=bias is not None, alpha=scale, out=logits)
            if hidden is not None:
                stream = 0 if len(hidden) == 1 else torch.arange(head.start, head.stop, device=query.device) // kv_heads
                logits[..., keys - hidden.shape[2] :].masked_fill_(hidden[stream, row], float("-inf"))
            probabilities = torch.softmax(logits, -1, out=logits)
            scores[head] += probabilities.sum(1) if every == 1 else counted[row] @ probabilities
            mixed[head, row] = torch.bmm(probabilities, mixable).to(mixed.dtype)
    return mixed.view(query.shape), scores.view(streams, kv_heads, keys)


def _hidden(
    queries: int, keys: int, lengths: torch.Tensor | None, causal: bool, device: torch.device
) -> torch.Tensor | None:
    """Which of the last slots each query must not see: [1, Q, Q], or [S, Q, K] where lengths differ; None: none."""
    behind = torch.arange(queries - 1, -1, -1, device=device) * causal
    if lengths is not None:
        return torch.arange(keys, device=device) > (lengths[:, None] - 1 - behind)[:, :, None]
    if not causal:
        return None
    return torch.ones(1, queries, queries, dtype=torch.bool, device=device).triu(1)


def _block(pairs: int, rows: int, keys: int, device: torch.device) -> tuple[int, int]:
    """Heads and rows of a block: a head for each thread where there are so many, so that a row stays with its core."""
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    fit = threads * _BLOCK_BYTES[device.type] // (4 * keys)  # rows of a block, of all its heads together
    some_heads = min(pairs, max(threads, fit // rows))
    pieces = -(-rows // max(1, fit // some_heads))
    return some_heads, -(-rows // pieces)
