"""Layers on a line, under one total."""

from __future__ import annotations

import pytest

from statekv.cache.budgets import layer_budgets


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
