"""The four figures are there, differ, and need matplotlib, which is said in one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from statekv.analysis.holdings import Analysis, Moment
from statekv.analysis.plots import draw_curves, lit, most_held, write_film, write_strip
from tests.analysis.streams import watched


# Stars of what is caught, and none; three steps are the fewest.
@pytest.mark.parametrize(("steps", "budget"), [(6, 12), (3, 10_000)])
def test_four_figures(tmp_path: Path, steps: int, budget: int) -> None:
    files = draw_curves(watched("internvl", steps, budget=budget), "tiny", tmp_path)
    assert [file.name for file in files] == ["concentration.png", "recall.png", "churn.png", "held-map.png"]
    assert len({file.read_bytes() for file in files}) == 4
    for file in files:
        with Image.open(file) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 300
            assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 30


def test_one_held_patch_is_the_one_bright_rectangle() -> None:
    pixels = np.full((40, 60, 3), 200, np.uint8)
    shares = np.zeros((2, 3), np.float32)
    shares[1, 2] = 1
    found = lit(pixels, shares)
    assert (found[20:, 40:] == 200).all()
    found[20:, 40:] = 0
    assert found.max() < 60


def test_colours_fade_to_grey_with_the_share() -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[..., 0] = 240
    levels = [lit(pixels, np.full((1, 1), share, np.float32))[0, 0].astype(int) for share in (0, 0.1, 0.5, 1)]
    assert [int(level[0]) for level in levels] == sorted(int(level[0]) for level in levels)
    assert levels[0][0] == levels[0][1] < 30
    assert levels[3].tolist() == [240, 0, 0]


def test_patches_need_not_divide_the_picture() -> None:
    shares = np.linspace(0, 1, 35, dtype=np.float32).reshape(5, 7)
    found = lit(np.full((33, 50, 3), 200, np.uint8), shares)
    assert found[0, 0].max() < found[32, 0].max() < found[32, 49].max() == 200


def holding(found: Analysis, step: int) -> Analysis:
    """The same, as if one step alone had been held throughout."""
    moments = [
        Moment(m.step, m.pts_seconds, [np.full_like(p, s == step) for s, p in enumerate(m.patches)], 0.0)
        for m in found.moments
    ]
    return replace(found, moments=moments)


@pytest.fixture(scope="module")
def found() -> Analysis:
    return watched("qwen3_vl", 16, budget=14)


@pytest.mark.parametrize("step", [0, 3, 5, 7])
def test_the_frame_that_is_held_most_is_shown_for_its_stretch(found: Analysis, step: int) -> None:
    shown = most_held(holding(found, step), 2)
    assert len(shown) == 2
    assert shown[step // 4].step == step
    assert [picture.step for picture in most_held(found, 100)] == list(range(8))


def test_the_strip_has_a_row_for_each_moment_and_a_column_for_each_frame(found: Analysis, tmp_path: Path) -> None:
    with Image.open(write_strip(holding(found, 2), "tiny", tmp_path / "strip.png")) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    # 40 x 56 frames in cells of 69 x 96, 8 of them in 6 rows.
    assert pixels.shape == (62 + 6 * (69 + 4) + 26, 92 + 8 * (96 + 4), 3)
    bottom = pixels[62 + 5 * 73 : 62 + 5 * 73 + 69, 92:]
    spread = [bottom[:, 100 * column : 100 * column + 96].std(axis=(0, 1)).mean() for column in range(8)]
    assert int(np.argmax(spread)) == 2  # the one with its colours


def test_the_film_has_a_picture_for_each_moment(found: Analysis, tmp_path: Path) -> None:
    with Image.open(write_film(found, "tiny", tmp_path / "held.webp")) as film:
        assert film.format == "WEBP"
        assert film.n_frames == len(found.moments) == 8  # type: ignore[attr-defined]
        assert min(film.size) > 300


def test_a_cache_of_nothing_but_text_can_be_drawn(found: Analysis, tmp_path: Path) -> None:
    nothing = holding(found, step=-1)
    with Image.open(write_film(nothing, "tiny", tmp_path / "held.webp")) as film:
        film.load()
    write_strip(nothing, "tiny", tmp_path / "strip.png")
    assert [picture.step for picture in most_held(nothing, 2)] == [0, 4]
