"""The four figures are there, differ, and need matplotlib, which is said in one line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

from statekv.analysis.curves import draw_curves
from statekv.errors import ConfigError
from tests.analysis.streams import watched


@pytest.mark.parametrize("budget", [12, 10_000])
def test_four_figures(tmp_path: Path, budget: int) -> None:
    pytest.importorskip("matplotlib")
    files = draw_curves(watched("internvl", 6, budget=budget), "tiny", tmp_path)
    assert [file.name for file in files] == ["concentration.png", "recall.png", "churn.png", "held-map.png"]
    assert len({file.read_bytes() for file in files}) == 4
    for file in files:
        with Image.open(file) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 300
            assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 30


def test_three_steps_can_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert len(draw_curves(watched("internvl", 3, budget=12), "tiny", tmp_path)) == 4


def test_without_matplotlib_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'statekv\[plot\]'") as caught:
        draw_curves(watched("internvl", 3, budget=12), "tiny", tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
