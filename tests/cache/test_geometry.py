"""Bytes of a token."""

from __future__ import annotations

import pytest
import torch

from statekv.cache.geometry import Geometry

CPU = torch.device("cpu")


# KiB per token as public InternVL3-1B/2B/8B and Qwen3-VL-2B/8B have it.
@pytest.mark.parametrize(
    ("layers", "kv_heads", "head_dim", "kib"),
    [(24, 2, 64, 12), (28, 2, 128, 28), (28, 4, 128, 56), (28, 8, 128, 112), (36, 8, 128, 144)],
)
def test_bytes_per_token(layers: int, kv_heads: int, head_dim: int, kib: int) -> None:
    assert Geometry(kv_heads, head_dim, torch.bfloat16, (CPU,) * layers).bytes_per_token == kib * 1024
    assert Geometry(kv_heads, head_dim, torch.float32, (CPU,) * layers).bytes_per_token == 2 * kib * 1024
