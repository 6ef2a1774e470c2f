"""The CSV files say what was found, and the summary is plain numbers."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from statekv.analysis.concentration import BUDGETS
from statekv.analysis.tables import summary, write_tables
from tests.analysis.streams import watched


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_tables_hold_every_layer_budget_and_moment(tmp_path: Path) -> None:
    found = watched("internvl", 7, budget=12)
    concentration, layers, held = (rows(path) for path in write_tables(found, tmp_path))
    assert [(int(row["layer"]), int(row["budget"])) for row in concentration] == [
        (layer, budget) for layer in range(3) for budget in BUDGETS
    ]
    for row in concentration:
        index = BUDGETS.index(int(row["budget"]))
        shares = found.shares[int(row["layer"])]
        assert float(row["captured"]) == pytest.approx(shares.captured[index], abs=1e-5)
        assert float(row["weighted_recall"]) == pytest.approx(shares.recall[index], abs=1e-5)
        assert float(row["retention"]) + float(row["churn"]) == pytest.approx(1, abs=1e-5)
    assert [float(row["captured_by_carried"]) for row in layers] == pytest.approx(
        [shares.carried for shares in found.shares], abs=1e-5
    )
    last = {int(row["step"]): float(row["share"]) for row in held if row["after_step"] == "6"}
    expected = {step: float(share) for step, share in enumerate(found.moments[-1].frames) if share}
    assert last == pytest.approx(expected, abs=1e-4)
    assert {row["after_seconds"] for row in held} == {str(second) for second in range(7)}


def test_the_summary_survives_json() -> None:
    found = watched("qwen2_5_vl", 8, budget=12)
    told = json.loads(json.dumps(summary(found)))
    assert (told["frames"], told["steps"], told["budget"], told["layers"]) == (8, 4, 12, [0, 1, 2])
    assert set(told["by_budget"]["churn"]) == {str(budget) for budget in BUDGETS}
    assert 0 < told["captured_by_carried"] <= told["captured_by_best"] < 1
    end = told["held_at_the_end"]
    assert 0 <= end["text"] <= 1
    assert end["text_of_the_stream"] == pytest.approx(1 - sum(p.tokens.size for p in found.pictures) / found.tokens)
    assert 0 < end["oldest_half_of_the_steps"] < 1
