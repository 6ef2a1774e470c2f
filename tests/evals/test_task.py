"""Shares of right answers."""

from __future__ import annotations

import math

import pytest

from statekv.evals.task import macro_share, share, shares

ROWS = [
    {"kind": "order", "score": True, "letter": True},
    {"kind": "count", "score": False, "letter": False},
    {"kind": "order", "score": True, "letter": False},
    {"kind": "order", "score": False, "letter": False},
]


def test_shares_by_hand() -> None:
    assert share(ROWS) == 2 / 4
    assert share(ROWS, "letter") == 1 / 4
    assert list(shares(ROWS, "kind").items()) == [("order", 2 / 3), ("count", 0.0)]


def test_the_macro_share_weighs_kinds_alike() -> None:
    assert macro_share(ROWS, "kind") == pytest.approx((2 / 3 + 0) / 2)


def test_there_is_no_share_of_nothing() -> None:
    assert math.isnan(share([]))
    assert math.isnan(macro_share([], "kind"))
    assert shares([], "kind") == {}
