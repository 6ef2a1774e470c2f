"""From scores to kept keys: which ones stay, and the few moves that make a full buffer hold exactly those."""

from __future__ import annotations

import torch


def best(scores: torch.Tensor, budget: int) -> torch.Tensor:
    """Which keys have the `budget` highest scores [streams, kv_heads, K], each head for itself: bool of that shape,
    with so many True in every row.
    """
    kept = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    return kept.scatter_(-1, scores.topk(budget, sorted=False).indices, True)


def earliest_best(scores: torch.Tensor, number: int) -> torch.Tensor:
    """Which of [n] scores without NaN are the `number` highest, or all: [n] bool. Of equal ones the first count;
    several times as fast as sorting.
    """
    number = min(number, len(scores))
    if not number:
        return torch.zeros_like(scores, dtype=torch.bool)
    least = scores.topk(number, sorted=False).values.amin()
    above, level = scores > least, scores == least
    return above | (level & (level.cumsum(0) <= number - above.sum()))


def moves(kept: torch.Tensor, budget: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies that bring every kept key into the first `budget` slots without touching those already there.

    A kept key behind slot `budget` moves into a slot whose key is not kept. Heads differ in how many such pairs they
    have; the rest of a row copies a slot onto itself, so that the shape does not depend on the data.

    Args:
        kept: [streams, kv_heads, K] bool, `budget` True in every row.

    Returns:
        source and target slots, both [streams, kv_heads, min(K - budget, budget)] int64.
    """
    pairs = min(kept.shape[-1] - budget, budget)
    arriving, arrivals = kept[..., budget:].byte().topk(pairs)
    vacant = (~kept[..., :budget]).byte().topk(pairs).indices
    return torch.where(arriving.bool(), budget + arrivals, vacant), vacant


def apply_moves(buffer: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
    """Carry out `moves` in place.

    Args:
        buffer: [..., streams, kv_heads, slots, D]: keys, values or both in front.
        source, target: [streams, kv_heads, M] int64.
    """
    shape = (*buffer.shape[:-2], source.shape[-1], buffer.shape[-1])
    moved = buffer.gather(-2, source.unsqueeze(-1).expand(shape))
    buffer.scatter_(-2, target.unsqueeze(-1).expand(shape), moved)
