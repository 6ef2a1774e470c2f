"""The picture of the step times is a picture, and its absence is one line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

from statekv.errors import ConfigError
from statekv.evals.cards.compare import MethodResult
from statekv.evals.cards.picture import draw_step_times

FLAT = MethodResult("statekv", step_ms=[[2.0] * 64, [2.5] * 64])
RISING = MethodResult("full", step_ms=[[1.0 + 0.1 * i for i in range(64)]] * 2)


def colors(path: Path) -> int:
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG"
        assert min(picture.size) > 200
        found = picture.convert("RGB").getcolors(1 << 24)
    assert found is not None
    return len(found)


def test_a_png_with_something_on_it(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "new" / "times.png"
    draw_step_times([RISING, FLAT], path, "64 frames")
    assert colors(path) > 30


def test_lines_that_differ_give_pictures_that_differ(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pictures = []
    for index, result in enumerate((FLAT, RISING)):
        draw_step_times([MethodResult("x", step_ms=result.step_ms)], tmp_path / f"{index}.png", "")
        pictures.append((tmp_path / f"{index}.png").read_bytes())
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize("steps", [1, 15, 20])
def test_few_steps_can_be_drawn(tmp_path: Path, steps: int) -> None:
    pytest.importorskip("matplotlib")
    draw_step_times([MethodResult("full", step_ms=[[1.0] * steps])], tmp_path / "few.png", "")
    assert colors(tmp_path / "few.png") > 1


def test_without_matplotlib_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'statekv\[plot\]'") as caught:
        draw_step_times([FLAT], tmp_path / "times.png", "")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "times.png").exists()
