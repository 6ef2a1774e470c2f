"""How far a rule is from full attention on text, and how sure that is."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from statekv.bench.harness import Bars, Panel, read_methods
from statekv.bench.pretrained import (
    Plan,
    interval,
    measure,
    own_text,
    panels,
    ratio,
    read_text,
    windows_of,
)
from statekv.errors import ConfigError
from statekv.models.families.text import load_text
from tests.cli.test_cli import command
from tests.models.families.test_text import checkpoint

METHODS = read_methods(["full,statekv,recency_window,random", "statekv_weighted,statekv:carry=ada_kv:sinks=4"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("text"))


def found(folder: Path, shares: tuple[float, ...]) -> list[tuple[float, ...]]:
    model, tokenizer, name = load_text(folder, torch.device("cpu"), torch.float32)
    plan = Plan(tokens=96, asked=16, step=16, shares=shares, methods=METHODS)
    rows = measure(model, windows_of(own_text(), tokenizer, 3, 112), plan, name, lambda: None)
    assert [row.subject for row in rows] == list(METHODS) * len(shares)
    drawn = panels(rows)
    bars = [panel for panel in drawn if isinstance(panel, Bars)]
    assert [panel.title for panel in bars] == [f"{share:g} % carried" for share in shares]
    assert all(list(panel.lines) == list(METHODS) and panel.lines["statekv"] == (1, 1, 1) for panel in bars)
    lines = [panel.lines for panel in drawn if isinstance(panel, Panel)]
    assert [[len(points) for points in found.values()] for found in lines] == (
        [[len(shares)] * len(METHODS)] if len(shares) > 1 else []
    )
    assert all("the paper's" in row.remark for row in rows if row.subject != "statekv")
    return [row.samples for row in rows]


def test_a_budget_that_holds_everything_is_full_attention(folder: Path) -> None:
    assert all(abs(kl) < 1e-6 for samples in found(folder, (100.0,)) for kl in samples)


def test_a_small_budget_is_not(folder: Path) -> None:
    rows = found(folder, (10.0, 50.0))
    assert all(kl > 0 for samples in rows for kl in samples)
    assert len(set(rows)) == len(rows)


def test_the_ratio_is_geometric_and_its_interval_holds_it() -> None:
    assert ratio([2.0, 8.0], [1.0, 1.0]) == pytest.approx(4)
    assert ratio([3.0], [3.0]) == 1
    low, high = interval([1.0, 2, 4, 8, 16], [1.0] * 5)
    assert 1 <= low < 4 < high <= 16
    assert interval([2.0] * 4, [1.0] * 4) == pytest.approx((2, 2))
    assert math.isclose(ratio([0.0], [0.0]), 1)  # full attention beside itself


def test_windows_lie_apart_and_a_short_text_is_refused(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_text(folder, torch.device("cpu"), torch.float32)[1]
    halves = [windows_of("any", lambda _: list(range(310)), 3, 50, choosing) for choosing in (False, True)]
    assert [[(int(ids[0, 0]), int(ids[0, -1])) for ids in half] for half in halves] == [
        [(0, 49), (103, 152), (206, 255)],
        [(51, 100), (155, 204), (258, 307)],
    ]
    with pytest.raises(ConfigError, match=r"but 3 windows of 900, and as many .* need 5400 \(give a longer text"):
        windows_of("a b c d " * 50, tokenizer, 3, 900)
    with pytest.raises(ConfigError, match="cannot be read as text"):
        read_text(tmp_path)
    (tmp_path / "mine").write_text("mine", encoding="utf-8")
    assert read_text(tmp_path / "mine") == "mine"


def test_the_command_writes_rows_and_a_picture(folder: Path, tmp_path: Path) -> None:
    csv = tmp_path / "rows.csv"
    small = [
        "--windows",
        "2",
        "--tokens",
        "64",
        "--step",
        "16",
        "--method",
        "statekv,statekv_weighted",
        "--shares",
        "12.5,50",
        "--csv",
        str(csv),
    ]
    told = command("bench", "pretrained", folder, *small)
    assert told.code == 0, told.err
    assert "weighted" in told.out
    assert len(csv.read_text(encoding="utf-8").splitlines()) == 5
    assert csv.with_suffix(".png").is_file()


@pytest.mark.parametrize("shares", ["0", "101", "ten", "", "nan", "5,,10"])
def test_shares_that_are_no_percents_are_refused(shares: str, folder: Path) -> None:
    told = command("bench", "pretrained", folder, "--shares", shares)
    assert told.code == 1
    assert f"shares is {shares!r}, but must be percents above 0, up to 100" in told.err
    assert told.err.count("\n") == 1


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("nothing", "unknown method 'nothing'"),
        ("statekv:decay", "'decay' in statekv:decay is no setting of a method"),
        ("uniform", "uniform has no budget, so that nothing is left to compare"),
        ("random:decay=0.5", "decay is 0.5"),
    ],
)
def test_methods_that_cannot_be_compared_are_refused(method: str, told: str, folder: Path) -> None:
    found = command("bench", "pretrained", folder, "--method", f"statekv,{method}")
    assert found.code == 1
    assert told in found.err
    assert found.err.count("\n") == 1
