"""The definition equals the formula, written in plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from statekv.ops.reference import attention_with_key_scores
from tests.ops.inputs import SHAPES, Shape, spoil

TINY = [Shape(1, 1, 1, 1, 1, 2), Shape(1, 1, 1, 4, 4, 2), Shape(2, 2, 3, 3, 7, 4), Shape(1, 3, 2, 1, 5, 2)]


def by_hand(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    lengths: list[int] | None = None,
    causal: bool = True,
    every: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    streams, heads, queries, dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    q, k, v = query.tolist(), key.tolist(), value.tolist()
    mixed = torch.zeros(query.shape)
    scores = torch.zeros(streams, kv_heads, keys)
    for s in range(streams):
        for h in range(heads):
            g = h // (heads // kv_heads)
            for i in range(queries):
                used = keys if lengths is None else lengths[s]
                # Everything before the step, and the own keys up to itself.
                seen = range(used - queries + i + 1 if causal else used)
                weights = [math.exp(scale * sum(q[s][h][i][d] * k[s][g][j][d] for d in range(dim))) for j in seen]
                for j in seen:
                    share = weights[j] / sum(weights)
                    scores[s, g, j] += share if (queries - 1 - i) % every == 0 else 0
                    for d in range(dim):
                        mixed[s, h, i, d] += share * v[s][g][j][d]
    return mixed, scores


@pytest.mark.parametrize("shape", TINY, ids=str)
def test_equals_the_formula_in_loops(shape: Shape) -> None:
    query, key, value = shape.tensors()
    mixed, scores = attention_with_key_scores(query, key, value, scale=0.7)
    mixed_by_hand, scores_by_hand = by_hand(query, key, value, 0.7)
    torch.testing.assert_close(mixed, mixed_by_hand)
    torch.testing.assert_close(scores, scores_by_hand)


@pytest.mark.parametrize("every", [1, 2, 3, 9])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [None, [6, 4]])
def test_every_way_equals_the_formula_in_loops(lengths: list[int] | None, causal: bool, every: int) -> None:
    shape = TINY[2]
    inputs = shape.tensors()
    in_use = None
    if lengths is not None:
        in_use = torch.tensor(lengths, dtype=torch.int32)
        inputs = spoil(inputs, in_use)
    found = attention_with_key_scores(*inputs, scale=0.7, lengths=in_use, causal=causal, every=every)
    query, key, value = inputs
    torch.testing.assert_close(found, by_hand(query, key, value, 0.7, lengths, causal, every))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores_are_shares_of_all_queries(shape: Shape) -> None:
    _, scores = attention_with_key_scores(*shape.tensors(), scale=shape.scale)
    assert scores.shape == (shape.streams, shape.kv_heads, shape.keys)
    assert (scores > 0).all()
    total = torch.full((shape.streams, shape.kv_heads), float(shape.queries * shape.group))
    torch.testing.assert_close(scores.sum(-1), total)


def test_a_key_is_hidden_from_earlier_queries_only() -> None:
    shape = Shape(1, 1, 2, 4, 9, 8)
    query, key, value = shape.tensors()
    before, _ = attention_with_key_scores(query, key, value, scale=1.0)
    key[:, :, 7] += 1  # the third of four own keys
    after, _ = attention_with_key_scores(query, key, value, scale=1.0)
    changed = (before != after).any(-1)
    assert changed.tolist() == [[[False, False, True, True]] * 2]


def test_the_order_of_carried_keys_does_not_matter() -> None:
    shape = Shape(1, 2, 2, 3, 10, 8)
    query, key, value = shape.tensors()
    order = torch.cat([torch.randperm(7, generator=torch.Generator().manual_seed(1)), torch.arange(7, 10)])
    mixed, scores = attention_with_key_scores(query, key, value, scale=1.0)
    shuffled, shuffled_scores = attention_with_key_scores(query, key[:, :, order], value[:, :, order], scale=1.0)
    torch.testing.assert_close(shuffled, mixed)
    torch.testing.assert_close(shuffled_scores, scores[..., order])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype: torch.dtype) -> None:
    shape = Shape(1, 2, 2, 3, 10, 8)
    query, key, value = shape.tensors(dtype)
    mixed, scores = attention_with_key_scores(query, key, value, scale=shape.scale)
    exact, exact_scores = attention_with_key_scores(query.float(), key.float(), value.float(), scale=shape.scale)
    assert mixed.dtype == dtype
    assert torch.equal(mixed, exact.to(dtype))
    assert scores.dtype == torch.float32
    assert torch.equal(scores, exact_scores)


@pytest.mark.parametrize("shape", TINY[2:], ids=str)
def test_a_key_of_weight_three_is_three_keys(shape: Shape) -> None:
    """Written out three times, the key receives in sum what the weighted one does."""
    query, key, value = shape.tensors()
    bias = torch.zeros(key.shape[:3])
    bias[..., 0] = math.log(3)
    mixed, scores = attention_with_key_scores(query, key, value, scale=0.7, bias=bias)
    thrice = [torch.cat([tensor[:, :, :1], tensor[:, :, :1], tensor], dim=2) for tensor in (key, value)]
    expected, spread = attention_with_key_scores(query, *thrice, scale=0.7)
    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(scores, torch.cat([spread[..., :3].sum(-1, keepdim=True), spread[..., 3:]], dim=-1))


def test_a_slot_of_weight_zero_holds_no_key() -> None:
    query, key, value = TINY[2].tensors()
    bias = torch.zeros(key.shape[:3])
    bias[..., 1] = float("-inf")
    mixed, scores = attention_with_key_scores(query, key, value, scale=0.7, bias=bias)
    left = [0, *range(2, key.shape[2])]
    expected, scores_left = attention_with_key_scores(query, key[:, :, left], value[:, :, left], scale=0.7)
    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(scores[..., left], scores_left)
    assert not scores[..., 1].any()
