"""Attention without scores mixes what the definition mixes: the queries are the last of the keys."""

from __future__ import annotations

import pytest
import torch

from statekv.ops import naive, plain
from tests.ops.inputs import SHAPES, Shape

ALIGNMENTS = [
    Shape(2, kv_heads, group, queries, keys, 16)
    for kv_heads, group in ((2, 1), (2, 2), (1, 7))
    for queries, keys in ((1, 1), (1, 12), (2, 12), (11, 12), (12, 12))
]


@pytest.mark.parametrize("shape", [*ALIGNMENTS, *SHAPES], ids=str)
def test_equals_the_definition(shape: Shape) -> None:
    query, key, value = shape.tensors(slack=3)
    expected, _ = naive.attention_with_key_scores(query, key, value, scale=0.3)
    torch.testing.assert_close(plain.attention(query, key, value, scale=0.3), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", ALIGNMENTS, ids=str)
def test_bfloat16(shape: Shape) -> None:
    query, key, value = shape.tensors(torch.bfloat16)
    mixed = plain.attention(query, key, value, scale=0.3)
    expected, _ = naive.attention_with_key_scores(query, key, value, scale=0.3)
    assert mixed.dtype == torch.bfloat16
    # Probabilities and result are each rounded to 8 bits.
    torch.testing.assert_close(mixed, expected, atol=float(value.abs().max()) * 2.0**-7, rtol=2.0**-7)
