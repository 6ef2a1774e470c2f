"""Real sizes: the formula against torch's count of shapes, and the table of costs."""

from __future__ import annotations

import pytest

from statekv.bench.flops import check, measure, panel
from statekv.bench.sizes import SIZES, size_of


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("budget", [None, 300])
def test_torch_counts_the_same_in_real_widths(name: str, budget: int | None) -> None:
    assert check(name, budget, [256, 256, 100]).distance == 1


def test_torch_counts_the_same_in_real_depth() -> None:
    row = check("internvl3-1b", 300, [256, 256], layers=None)
    assert row.distance == 1
    assert row.samples[0] > 0.3


def test_full_is_quadratic_and_statekv_is_linear() -> None:
    rows = measure("internvl3-1b", [256], [1000, 2000, 4000])
    full, statekv = ([row.samples[0] for row in rows if row.subject == name] for name in ("full", "statekv"))
    assert statekv[2] - statekv[1] == pytest.approx(2 * (statekv[1] - statekv[0]))
    assert full[2] - full[1] > 3 * (full[1] - full[0])
    assert all(row.floor is not None and row.samples[0] > row.floor for row in rows)


def test_families_differ_in_frames_per_step() -> None:
    (one,) = measure("internvl3-8b", [], [10])
    (two,) = measure("eagle2.5-8b", [], [10])
    assert one.samples == two.samples
    assert measure("qwen3-vl-2b", [], [9])[0].samples == measure("qwen3-vl-2b", [], [10])[0].samples


def test_the_picture_ends_where_the_table_does() -> None:
    found = panel("qwen3-vl-4b", [256], 37)
    assert set(found.lines) == {"full", "statekv, B = 256"}
    last = {row.subject: row.samples[0] for row in measure("qwen3-vl-4b", [256], [37])}
    assert found.lines["full"][-1] == pytest.approx((37, last["full"] / 1000))
    assert found.lines["statekv, B = 256"][-1] == pytest.approx((37, last["statekv"] / 1000))


def test_sizes_are_known_by_name() -> None:
    assert size_of("qwen3-vl-4b").layers == 36
