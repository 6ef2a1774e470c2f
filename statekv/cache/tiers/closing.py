"""Gaps in a cache's buffers, closed in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch

Run = tuple[int, int, int]  # tokens that lie at the first place move to the second, and how many they are


@torch.inference_mode()
def close_gaps(buffers: Sequence[torch.Tensor], runs: Sequence[Run], at_once: int) -> None:
    """Move tokens towards the front.

    Args:
        buffers: of each layer [2, streams, kv_heads, capacity, head_dim].
        runs: from front to back, each to a place before its own.
        at_once: tokens that are copied aside, for source and target may overlap.
    """
    for source, target, length in _joined(runs):
        for shift in range(0, length, at_once):
            count = min(at_once, length - shift)
            for held in buffers:
                moved = held[..., source + shift : source + shift + count, :].clone()
                held[..., target + shift : target + shift + count, :] = moved


def _joined(runs: Sequence[Run]) -> Iterator[Run]:
    """Neighbouring runs that move equally far, as one."""
    for _, group in groupby(runs, key=lambda run: run[0] - run[1]):
        members = list(group)
        yield members[0][0], members[0][1], sum(length for _, _, length in members)
