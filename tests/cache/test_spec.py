"""Bytes of a token."""

from __future__ import annotations

import random

import pytest
import torch

from statekv.cache.policies.wrappers import layer_budgets
from statekv.cache.spec import KVSpec, PositionShift, numbers_in

CPU = torch.device("cpu")


# KiB per token as public InternVL3-1B/2B/8B and Qwen3-VL-2B/8B have it.
@pytest.mark.parametrize(
    ("layers", "kv_heads", "head_dim", "kib"),
    [(24, 2, 64, 12), (28, 2, 128, 28), (28, 4, 128, 56), (28, 8, 128, 112), (36, 8, 128, 144)],
)
def test_bytes_per_token(layers: int, kv_heads: int, head_dim: int, kib: int) -> None:
    assert KVSpec(kv_heads, head_dim, torch.bfloat16, (CPU,) * layers).bytes_per_token == kib * 1024
    assert KVSpec(kv_heads, head_dim, torch.float32, (CPU,) * layers).bytes_per_token == 2 * kib * 1024


def by_hand(moves: PositionShift, token: int) -> int:
    found = 0
    for start, by in zip(moves.starts, moves.by, strict=True):
        if start <= token:
            found = by
    return found


@pytest.mark.parametrize("seed", range(5))
def test_tokens_move_as_far_as_the_last_step_that_begins_before_them(seed: int) -> None:
    draw = random.Random(seed)
    starts = sorted(draw.sample(range(7, 300), draw.choice((1, 2, 40))))
    moves = PositionShift(starts, [draw.randint(-50, 0) for _ in starts])
    tokens = torch.arange(310)
    found = moves.of(tokens)
    assert found.dtype == torch.int64
    assert found.tolist() == [by_hand(moves, token) for token in range(310)]
    assert not found[: starts[0]].any()  # what lies before the first start stays


def test_any_shape_and_order_of_tokens() -> None:
    moves = PositionShift((10, 20), (-3, -8))
    token_ids = torch.tensor(
        [[[25, 3], [9, 10]], [[20, 19], [11, 1000]]], dtype=torch.int32
    )  # as the carried cache has it
    assert moves.of(token_ids).tolist() == [[[-8, 0], [0, -3]], [[-8, -3], [-3, -8]]]
    assert moves.of(torch.empty(0, dtype=torch.int64)).tolist() == []


@pytest.mark.parametrize(
    "spots", [[], [(0, 3)], [(2, 2), (5, 6)], [(0, 4), (4, 9), (30, 31)], [(7, 20), (3, 5)]], ids=str
)
def test_numbers_one_behind_another(spots: list[tuple[int, int]]) -> None:
    found = numbers_in([start for start, _ in spots], [stop for _, stop in spots])
    assert found.dtype == torch.int64
    assert found.tolist() == [token for start, stop in spots for token in range(start, stop)]


@pytest.mark.parametrize("slope", [-0.97, -0.5, -0.1, 0.0, 0.3, 0.5, 0.97])
@pytest.mark.parametrize("layers", [1, 2, 3, 24, 28, 36])
@pytest.mark.parametrize("budget", [34, 256, 4096, 4097])
def test_the_sum_is_that_of_a_flat_profile_and_each_layer_lies_on_the_line(
    budget: int, layers: int, slope: float
) -> None:
    found = layer_budgets(budget, layers, slope)
    assert sum(found) == layers * budget
    assert min(found) >= 1
    for layer, share in enumerate(found):
        line = budget * (1 + slope - 2 * slope * layer / max(1, layers - 1)) if layers > 1 else budget
        assert abs(share - line) < 1


def test_no_slope_is_the_same_for_all() -> None:
    assert layer_budgets(7, 5, 0.0) == [7] * 5


def test_a_slope_by_hand() -> None:
    assert layer_budgets(10, 3, 0.5) == [15, 10, 5]
    assert layer_budgets(10, 3, -0.5) == [5, 10, 15]
    assert layer_budgets(10, 4, 0.2) == [12, 11, 9, 8]  # 12, 10.67, 9.33, 8


@pytest.mark.parametrize("slope", [0.25, 0.5, 0.75])
def test_the_other_sign_is_the_same_line_from_the_other_end(slope: float) -> None:
    assert layer_budgets(64, 5, slope) == layer_budgets(64, 5, -slope)[::-1]
