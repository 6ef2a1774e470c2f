"""The picture has a line for each method; what cannot be drawn is one line."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from statekv.errors import ConfigError
from statekv.evals.picture import draw
from statekv.evals.report import Figures

RUN = Figures(
    task="cards",
    variant="1024 frames",
    model="demo",
    method="full",
    budget=None,
    questions=100,
    videos=10,
    failed={},
    headlines={"accuracy": 0.8, "count": 0.5},
    low=0.7,
    high=0.9,
    difference=None,
    difference_low=None,
    difference_high=None,
    kl=0.0,
    agreement=1.0,
    chance=0.3,
    flops=2e11,
    paper=None,
    notes=(),
)
SMALL = replace(RUN, method="statekv", budget=100, headlines={"accuracy": 0.7}, flops=5e10, low=0.6, high=0.72)
LARGE = replace(SMALL, budget=200, headlines={"accuracy": 0.75}, flops=7e10, high=0.8)


def pixels(path: Path) -> bytes:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300
        return picture.convert("RGB").tobytes()


def test_every_run_changes_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    drawn = []
    for number, runs in enumerate(([RUN], [RUN, SMALL], [RUN, SMALL, LARGE])):
        path = tmp_path / "new" / f"{number}.png"
        draw(runs, path)
        drawn.append(pixels(path))
    assert len(set(drawn)) == 3


def test_methods_of_one_cost_are_set_apart(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw([RUN, SMALL, replace(SMALL, method="random")], tmp_path / "both.png")
    with Image.open(tmp_path / "both.png") as picture:
        axes = picture.convert("RGB").crop((0, 0, int(0.7 * picture.width), picture.height))  # without the legend
    counts = {color: count for count, color in axes.getcolors(1 << 24) or []}
    assert counts[(255, 127, 14)] > 10  # of the second method, orange, which the third would hide


def test_runs_without_questions_or_intervals_are_no_obstacle(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    nan = float("nan")
    failed = replace(SMALL, method="random", questions=0, headlines={"accuracy": nan}, flops=nan, chance=nan)
    draw([failed, replace(RUN, low=nan, high=nan)], tmp_path / "some.png")
    draw([RUN], tmp_path / "one.png")
    assert pixels(tmp_path / "some.png") != b""


@pytest.mark.parametrize(
    ("runs", "told"),
    [
        ([], "of nothing"),
        ([replace(RUN, questions=0)], "of nothing"),
        ([RUN, replace(SMALL, model="other")], "cards, 1024 frames, demo; cards, 1024 frames, other"),
        ([RUN, replace(SMALL, task="mlvu", variant="")], "cards, 1024 frames, demo; mlvu, demo"),
    ],
)
def test_what_does_not_belong_together(tmp_path: Path, runs: list[Figures], told: str) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ConfigError, match=told):
        draw(runs, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_without_matplotlib_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'statekv\[plot\]'"):
        draw([RUN], tmp_path / "none.png")
