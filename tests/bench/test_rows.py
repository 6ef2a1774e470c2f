"""A row's figures, and the file that they are added to."""

from __future__ import annotations

import csv
import datetime
import json
import math
from pathlib import Path

import pytest
import torch

from statekv.bench.rows import Circumstances, Row, append, check_columns, device_name
from statekv.errors import ConfigError

ROW = Row("attention", "blocked", {"model": "a, b", "budget": 256}, "ms", (4.0, 1.0, 2.0, 3.0, 5.0), 1.5, 2.0)
LEFT_OUT = Row("attention", "naive", {"budget": 16384}, "ms", (), 1.5, 2.0, "left out: too large")
HERE = Circumstances("statekv bench attention", "a processor", 2, "python 3.11", "abc1234", "2026-11-21")


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_quantiles_are_interpolated() -> None:
    assert [ROW.quantile(share) for share in (0, 0.2, 0.5, 1)] == pytest.approx([1, 1.8, 3, 5])
    assert ROW.median == 3


def test_distance_and_ratio_are_of_the_median() -> None:
    assert (ROW.distance, ROW.ratio) == (2, 1.5)


def test_without_samples_there_is_nothing_to_say() -> None:
    assert math.isnan(LEFT_OUT.median)
    assert (LEFT_OUT.distance, LEFT_OUT.ratio) == (None, None)


@pytest.mark.parametrize("floor", [None, 0.0])
def test_without_a_floor_there_is_no_distance(floor: float | None) -> None:
    assert Row("b", "s", {}, "ms", (1.0,), floor).distance is None


def test_a_file_grows_under_one_header(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.csv"
    append(path, [ROW], HERE)
    append(path, [LEFT_OUT, ROW], HERE)
    found = read(path)
    assert [row["subject"] for row in found] == ["blocked", "naive", "blocked"]
    assert found[0] == found[2]
    assert json.loads(found[0]["setting"]) == ROW.setting
    assert [found[0][name] for name in ("p20", "p50", "p80", "runs")] == ["1.8", "3", "4.2", "5"]
    assert [found[0][name] for name in ("floor", "distance", "ratio")] == ["1.5", "2", "1.5"]
    assert [found[0][name] for name in ("device", "threads", "commit")] == ["a processor", "2", "abc1234"]
    assert [found[1][name] for name in ("p50", "runs", "distance", "ratio")] == ["", "0", "", ""]
    assert found[1]["remark"] == "left out: too large"


def test_an_empty_file_gets_a_header(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").touch()
    append(tmp_path / "rows.csv", [ROW], HERE)
    assert len(read(tmp_path / "rows.csv")) == 1


def test_somebody_elses_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "prices.csv"
    path.write_text("fruit,price\napple,3\n")
    for use in (lambda: append(path, [ROW], HERE), lambda: check_columns(path)):
        with pytest.raises(ConfigError, match=r"prices\.csv does not begin"):
            use()
    assert path.read_text() == "fruit,price\napple,3\n"


def test_circumstances_of_this_machine() -> None:
    here = Circumstances.here("statekv bench x", torch.device("cpu"))
    assert here.command == "statekv bench x"
    assert here.device == device_name(torch.device("cpu")) != ""
    assert here.threads == torch.get_num_threads()
    assert f"torch {torch.__version__}" in here.versions
    assert datetime.date.fromisoformat(here.date).year >= 2026
