"""A token moves with its step."""

from __future__ import annotations

import random

import pytest
import torch

from statekv.cache.moves import Moves, numbers_in


def by_hand(moves: Moves, token: int) -> int:
    found = 0
    for start, by in zip(moves.starts, moves.by, strict=True):
        if start <= token:
            found = by
    return found


@pytest.mark.parametrize("seed", range(5))
def test_tokens_move_as_far_as_the_last_step_that_begins_before_them(seed: int) -> None:
    draw = random.Random(seed)
    starts = sorted(draw.sample(range(7, 300), draw.choice((1, 2, 40))))
    moves = Moves(starts, [draw.randint(-50, 0) for _ in starts])
    tokens = torch.arange(310)
    found = moves.of(tokens)
    assert found.dtype == torch.int64
    assert found.tolist() == [by_hand(moves, token) for token in range(310)]
    assert not found[: starts[0]].any()  # what lies before the first start stays


def test_any_shape_and_order_of_tokens() -> None:
    moves = Moves((10, 20), (-3, -8))
    born = torch.tensor([[[25, 3], [9, 10]], [[20, 19], [11, 1000]]], dtype=torch.int32)  # as the carried cache has it
    assert moves.of(born).tolist() == [[[-8, 0], [0, -3]], [[-8, -3], [-3, -8]]]
    assert moves.of(torch.empty(0, dtype=torch.int64)).tolist() == []


@pytest.mark.parametrize(
    "spots", [[], [(0, 3)], [(2, 2), (5, 6)], [(0, 4), (4, 9), (30, 31)], [(7, 20), (3, 5)]], ids=str
)
def test_numbers_one_behind_another(spots: list[tuple[int, int]]) -> None:
    found = numbers_in([start for start, _ in spots], [stop for _, stop in spots])
    assert found.dtype == torch.int64
    assert found.tolist() == [token for start, stop in spots for token in range(start, stop)]
