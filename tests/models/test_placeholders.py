"""Placeholders found in a row of token ids."""

from __future__ import annotations

import pytest

from statekv.models.placeholders import runs


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([], []),
        ([1, 2], []),
        ([9], [(0, 1, 9)]),
        ([1, 9, 9, 2, 9], [(1, 3, 9), (4, 5, 9)]),
        ([9, 9, 8, 8, 9], [(0, 2, 9), (2, 4, 8), (4, 5, 9)]),
    ],
)
def test_runs_of_placeholders(ids: list[int], expected: list[tuple[int, int, int]]) -> None:
    assert list(runs(ids, [8, 9])) == expected
