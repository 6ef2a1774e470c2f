"""Rows of `bench answer`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from statekv.bench.answer import EACH, FIRST, Plan, measure, panels
from statekv.bench.floor import Machine, answer_bytes, head_flops, segment_flops
from statekv.bench.harness import Row
from statekv.models.size import Size
from statekv.runner import memory
from tests.bench.small import CPU, FAMILIES, INTERNVL

PLAN = Plan(INTERNVL, steps=(1, 6), tokens=10, question=5, answer=4, runs=2)
SLOW_PRODUCTS, SLOW_MEMORY = Machine(flops=1, read=1e18), Machine(flops=1e18, read=1)


def measured(plan: Plan, machine: Machine = SLOW_PRODUCTS) -> list[Row]:
    return measure(plan, device=CPU, dtype=torch.float32, machine=machine)


@pytest.mark.parametrize("size", FAMILIES, ids=lambda size: size.family)
def test_two_rows_per_length(size: Size) -> None:
    rows = measured(replace(PLAN, size=size))
    assert [(row.subject, row.setting["steps"]) for row in rows] == [(FIRST, 1), (FIRST, 6), (EACH, 1), (EACH, 6)]
    assert all(len(row.samples) == 2 and min(row.samples) > 0 for row in rows)


def test_floors_are_products_or_bytes() -> None:
    """The question's five tokens; a further token stands in the middle of the answer."""
    by_products = [row.floor for row in measured(PLAN)]
    flops = [segment_flops(INTERNVL, 5, past) for past in (10, 60)]
    flops += [segment_flops(INTERNVL, 1, past) for past in (17, 67)]
    assert by_products == [1000 * (count + head_flops(INTERNVL)) for count in flops]
    by_bytes = [row.floor for row in measured(PLAN, SLOW_MEMORY)]
    assert by_bytes == [1000 * answer_bytes(INTERNVL, past, torch.float32) for past in (10, 60, 17, 67)]


def test_lengths_that_do_not_fit_are_left_out_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = replace(PLAN, steps=(1, 1 << 24))
    monkeypatch.setattr(memory, "free_bytes", lambda _: 1 << 30)
    rows = measured(plan)
    assert [len(row.samples) for row in rows] == [2, 0, 2, 0]
    assert "left out: its cache would take" in rows[1].remark


def test_the_picture_has_both_times_and_their_floors() -> None:
    (panel,) = panels(measured(PLAN))
    assert list(panel.lines) == [FIRST, f"{FIRST}, floor", EACH, f"{EACH}, floor"]
    assert all([x for x, _ in points] == [1, 6] for points in panel.lines.values())
