"""A picture is a picture, and its absence is one line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

from statekv.bench.picture import Panel, draw
from statekv.drawing import check_drawing
from statekv.errors import ConfigError

RISING = Panel("rising", "step", "ms", {"full": [(1, 1.0), (8, 9.0)], "statekv": [(1, 1.0), (8, 1.5)]})
LOG = Panel("log", "budget", "ms", {"sdpa": [(256, 1.0), (4096, 12.0)]}, log_x=True, log_y=True)


@pytest.mark.parametrize("panels", [[RISING], [RISING, LOG] * 4])
def test_a_png_with_something_on_it(tmp_path: Path, panels: list[Panel]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "new" / "picture.png"
    draw(panels, path, "a title")
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.width >= 600
        found = picture.convert("RGB").getcolors(1 << 24)
    assert found is not None
    assert len(found) > 30


def test_other_points_give_another_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    flat = Panel("rising", "step", "ms", {name: [(x, 1.0) for x, _ in line] for name, line in RISING.lines.items()})
    for name, panel in (("rising", RISING), ("again", RISING), ("flat", flat)):
        draw([panel], tmp_path / f"{name}.png")
    rising, again, other = ((tmp_path / f"{name}.png").read_bytes() for name in ("rising", "again", "flat"))
    assert rising == again != other


def test_without_matplotlib_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for use in (check_drawing, lambda: draw([RISING], tmp_path / "picture.png")):
        with pytest.raises(ConfigError, match=r"pip install 'statekv\[plot\]'"):
            use()
    assert not list(tmp_path.iterdir())
