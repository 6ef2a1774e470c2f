"""Amounts of memory, written and counted."""

from __future__ import annotations

from typing import Any

import pytest

from statekv.capacity import bytes_of, told
from statekv.errors import ConfigError


@pytest.mark.parametrize(
    ("amount", "count"),
    [
        (1, 1),
        ("12", 12),
        ("8GiB", 8 * 2**30),
        ("8gib", 8 * 2**30),
        (" 1.5 MiB ", 3 * 2**19),
        ("500MB", 500_000_000),
        ("2TB", 2 * 10**12),
        ("7 KiB", 7168),
        ("9B", 9),
    ],
    ids=str,
)
def test_amounts_are_counted(amount: Any, count: int) -> None:
    assert bytes_of("memory", amount) == count


@pytest.mark.parametrize("amount", [0, -1, True, 1.5, "", "GiB", "8 apples", "-3GiB", "0", "1e3", "8G", [8]], ids=str)
def test_others_are_refused_in_one_line(amount: Any) -> None:
    with pytest.raises(ConfigError, match=r"disk is .* must be an amount of memory .*8GiB") as found:
        bytes_of("disk", amount)
    assert "\n" not in str(found.value)


def test_counts_are_told_in_a_unit_that_suits_them() -> None:
    counts = (5, 2048, 3 * 2**19, 8 * 2**30, 5 * 2**40)
    assert [told(count) for count in counts] == ["5 B", "2.0 KiB", "1.5 MiB", "8.0 GiB", "5.0 TiB"]
