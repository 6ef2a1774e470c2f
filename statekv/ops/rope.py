"""Rotary frequencies for a fixed horizon, and the position grids of multi-axis RoPE."""

from __future__ import annotations

from collections.abc import Callable

import torch

# Positions, [streams, T] or [3, streams, T], to the cos and sin [streams, T, head_dim] that keys are turned by.
Angles = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def dynamic_ntk_frequencies(theta: float, dim: int, trained_length: int, factor: float, horizon: int) -> torch.Tensor:
    """Inverse frequencies of dynamic NTK scaling, as if the sequence were `horizon` positions long.

    Args:
        theta: base of the trained frequencies.
        dim: rotated size of a head.
        trained_length: positions seen in training; up to there nothing is scaled.
        factor: the checkpoint's scaling factor.
        horizon: positions that the stream may reach.

    Returns:
        [dim / 2] float32.

    Source: "dynamic" in transformers' modeling_rope_utils; here the length is chosen once instead of followed.
    """
    length = max(horizon, trained_length)
    base = theta * (factor * length / trained_length - (factor - 1)) ** (dim / (dim - 2))
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    return torch.reciprocal(base**exponents)


def text_positions(start: int, length: int, device: torch.device) -> torch.Tensor:
    """[3, 1, length]: text counts up on all three axes at once."""
    return torch.arange(start, start + length, device=device).expand(3, 1, -1)


def grid_positions(start: int, height: int, width: int, device: torch.device) -> torch.Tensor:
    """[3, 1, height · width]: one picture of merged patches: time stands still, rows and columns count."""
    rows = torch.arange(height, device=device).repeat_interleave(width)
    columns = torch.arange(width, device=device).repeat(height)
    return start + torch.stack([torch.zeros_like(rows), rows, columns]).unsqueeze(1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each vector by its angles; with `-sin` back again.

    Args:
        x: [..., T, D]; D/2 pairs, halves apart.
        cos, sin: [T, D] or with leading dimensions that broadcast, each angle twice, as rotary modules return them.

    Source: `apply_rotary_pos_emb` of transformers' Llama, for one of its two tensors.
    """
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin
