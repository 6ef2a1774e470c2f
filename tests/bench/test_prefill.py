"""Rows of `bench prefill`: complete, comparable, honest about what was left out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from statekv.bench.floor import segment_flops
from statekv.bench.harness import Row, best_rate, read_methods
from statekv.bench.prefill import Plan, measure, panels
from statekv.errors import MemoryLimitError
from statekv.models.size import Size
from statekv.runner import memory
from tests.bench.small import CPU, FAMILIES, INTERNVL

PLAN = Plan(INTERNVL, steps=(1, 4, 9), budgets=(8, 32), tokens=10, runs=2, seconds=60)


@pytest.fixture(autouse=True)
def _small_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """The large one, which is timed beside the steps, takes longer than all of them."""
    monkeypatch.setattr("statekv.bench.harness._WIDTH", 64)


def measured(plan: Plan) -> list[Row]:
    """The rows of steps."""
    return measure(plan, device=CPU, dtype=torch.float32)[2:]


def rate_of(large: Row) -> float:
    """FLOP/s of the best large product of a run."""
    return 1000 * best_rate(large.samples, rows=10)  # samples are milliseconds


def test_products_are_measured_beside_the_steps() -> None:
    large, products = measure(PLAN, device=CPU, dtype=torch.float32)[:2]
    assert (large.subject, len(large.samples)) == ("large product", 2)
    assert large.floor == min(large.samples)
    assert (products.subject, len(products.samples)) == ("products alone", 2)
    assert products.floor == pytest.approx(1000 * 2 * INTERNVL.parameters * 10 / rate_of(large))
    assert not {"step"} & (large.setting.keys() | products.setting.keys())


@pytest.mark.parametrize("size", FAMILIES, ids=lambda size: size.family)
def test_a_row_per_step_and_method(size: Size) -> None:
    rows = measured(replace(PLAN, size=size))
    found = [(row.setting["step"], row.subject, row.setting.get("budget")) for row in rows]
    methods = [("full", None), ("statekv", 8), ("statekv", 32)]
    assert found == [(step, *method) for step in (1, 4, 9) for method in methods]
    assert all(len(row.samples) == 2 and row.unit == "ms" for row in rows)
    assert {(row.setting["model"], row.setting["layers"], row.setting["tokens"]) for row in rows} == {
        (size.name, 3, 10)
    }


def test_statekv_is_held_against_full_at_the_same_step() -> None:
    rows = measured(PLAN)
    for full, *others in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert full.reference is None
        assert [row.reference for row in others] == [full.median] * 2


def test_floors_count_the_keys_that_are_seen() -> None:
    large, _, *rows = measure(PLAN, device=CPU, dtype=torch.float32)
    floors = {(row.setting["step"], row.setting.get("budget")): row.floor for row in rows}
    seen = {(1, None): 0, (4, None): 30, (9, None): 80, (1, 8): 0, (4, 8): 8, (9, 8): 8, (4, 32): 30, (9, 32): 32}
    for key, past in seen.items():
        assert floors[key] == pytest.approx(1000 * segment_flops(INTERNVL, 10, past) / rate_of(large))


def test_remarks_hold_medians_against_the_usual_product() -> None:
    large, _, *rows = measure(replace(PLAN, runs=3), device=CPU, dtype=torch.float32)
    for row in rows:
        assert row.floor is not None
        usual = row.median / (row.floor * large.median / min(large.samples))
        assert row.remark == f"{usual:.3g} × the floor by medians"


def test_steps_that_do_not_fit_are_left_out_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda _: 1 << 30)
    rows = measured(replace(PLAN, steps=(1, 4, 1 << 20)))
    assert [len(row.samples) for row in rows] == [2] * 6 + [0] * 3
    assert all("left out: its caches would take" in row.remark for row in rows[6:])
    (panel,) = panels(rows)
    assert [x for x, _ in panel.lines["full"]] == [1, 4]


def test_a_machine_too_small_for_any_step_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda _: 1 << 30)
    with pytest.raises(MemoryLimitError, match=r"at step 1 would take .* \(try lower budgets"):
        measured(replace(PLAN, budgets=(1 << 20,)))


def test_a_line_per_method_and_budget() -> None:
    (panel,) = panels(measured(PLAN))
    assert panel.title == "internvl3-1b, 3 layers"
    assert list(panel.lines) == ["full", "statekv, B = 8", "statekv, B = 32"]
    assert all([x for x, _ in points] == [1, 4, 9] for points in panel.lines.values())


def test_steps_without_graphs_are_measured_beside_the_others() -> None:
    rows = measured(replace(PLAN, steps=(9,), plain=True))
    found = [(row.subject, row.setting.get("budget"), row.setting.get("plain")) for row in rows]
    bounded = [("statekv", budget, graph) for budget in (8, 32) for graph in (None, "yes")]
    assert found == [("full", None, None), *bounded]
    (panel,) = panels(rows)
    assert list(panel.lines)[1:3] == ["statekv, B = 8", "statekv, B = 8, plain"]


def test_other_methods_are_measured_at_each_budget() -> None:
    others = read_methods(["statekv,full", "statekv_weighted,statekv:carry=weighted(output_error=False)"])
    rows = measured(replace(PLAN, steps=(9,), budgets=(8,), others=others))
    spelled = ["statekv", "statekv_weighted", "statekv:carry=weighted(output_error=False)"]
    assert [(row.subject, row.setting.get("budget")) for row in rows] == [
        ("full", None),
        *((spelling, 8) for spelling in spelled),
    ]
    assert [row.reference for row in rows[1:]] == [rows[0].median] * 3
