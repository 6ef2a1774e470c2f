"""The analysis drawn as curves, in the paper's layout, and the carried cache as a map of time against time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from statekv.analysis.concentration import BUDGETS, Curves
from statekv.analysis.holdings import Analysis, Moment, Picture, Shares
from statekv.errors import writing

_LAYER_COLORS = "viridis"


def draw_curves(found: Curves, name: str, folder: Path) -> list[Path]:
    """Write concentration.png, recall.png and churn.png (the paper's figures 6, 7, 8), and of a video held-map.png."""
    pictures = {
        "concentration.png": _by_layer(found, name, "captured", "historical attention captured by the best B keys"),
        "recall.png": _by_layer(found, name, "recall", "weighted recall in the candidate pool"),
        "churn.png": _over_layers(found, name),
    }
    if isinstance(found, Analysis):
        pictures["held-map.png"] = _held_map(found, name)
    for file, figure in pictures.items():
        with writing(folder / file):
            figure.savefig(folder / file)
    return [folder / file for file in pictures]


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    return figure, figure.add_subplot()


def _by_layer(found: Curves, name: str, field: str, label: str) -> Any:
    """One line for each layer, coloured by depth; the carried cache's own catch as stars."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    figure, axes = _figure(6.4, 4.4)
    depth = Normalize(found.shares[0].layer, max(found.shares[-1].layer, found.shares[0].layer + 1))
    for row in found.shares:
        color = colormaps[_LAYER_COLORS](depth(row.layer))
        axes.plot(BUDGETS, getattr(row, field), marker="o", markersize=3.5, linewidth=1.4, color=color)
        if field == "captured" and found.budget < found.tokens:
            axes.plot(found.budget, row.carried, marker="*", markersize=11, color=color, markeredgecolor="black")
    if field == "captured" and found.budget < found.tokens:
        label_of_stars = f"caught by the carried cache, budget {found.budget}"
        axes.plot([], [], "*", color="white", markeredgecolor="black", label=label_of_stars)
        figure.legend(frameon=False, loc="outside upper center")
    _budget_axis(axes, found)
    axes.set(ylabel=label, title=_title(found, name))
    bar = figure.colorbar(ScalarMappable(depth, colormaps[_LAYER_COLORS]), ax=axes, label="layer")
    bar.ax.yaxis.get_major_locator().set_params(integer=True)
    return figure


def _over_layers(found: Curves, name: str) -> Any:
    figure, axes = _figure(5.6, 4.4)
    mean = found.mean_shares()
    axes.plot(BUDGETS, mean.retention, "o-", color="C0", label="retention")
    axes.plot(BUDGETS, mean.churn, "s-", color="C1", label="churn")
    axes.plot(BUDGETS, mean.recall, "^-", color="C2", label="weighted recall")
    _budget_axis(axes, found)
    axes.set(ylabel="fraction, mean over layers", title=_title(found, name))
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure


def _budget_axis(axes: Any, found: Curves) -> None:
    """B from 1 to 2^14; where B holds the whole stream, nothing is left to choose, and the ground is grey."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(BUDGETS)
    axes.set(xlabel="budget B (keys for each layer and KV head)", xlim=(BUDGETS[0] / 1.3, BUDGETS[-1] * 1.3))
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.25)
    if found.tokens < BUDGETS[-1]:
        axes.axvspan(found.tokens, BUDGETS[-1] * 1.3, color="0.93", zorder=0)
        middle = float(np.sqrt(found.tokens * BUDGETS[-1] * 1.3))
        axes.text(middle, 0.04, "more than\nthe stream", ha="center", fontsize=8, color="0.45")


def _held_map(found: Analysis, name: str) -> Any:
    """Time of the stream to the right, time of the frame upwards: a row that stays bright is a frame that is kept."""
    figure, axes = _figure(7.2, 4.8)
    shares = np.full((found.steps, len(found.moments)), np.nan, np.float32)
    for column, moment in enumerate(found.moments):
        shares[: len(moment.frames), column] = moment.frames
    seconds = [picture.pts_seconds for picture in found.pictures]
    moments = [moment.pts_seconds for moment in found.moments]
    # A few frames that are held whole, the newest above all, must not darken the others.
    top = max(0.05, float(np.nanquantile(shares, 0.99)))
    image = axes.pcolormesh(_edges(moments), _edges(seconds), shares, cmap="magma", vmin=0, vmax=top)
    axes.set(xlabel="time of the stream, seconds", ylabel="frame of this time, seconds", title=_title(found, name))
    axes.set_facecolor("0.93")
    axes.text(0.03, 0.96, "not seen yet", transform=axes.transAxes, va="top", color="0.45")
    figure.colorbar(image, ax=axes, label="share of the frame's patches in the carried cache")
    return figure


def _edges(centres: Sequence[float]) -> Any:
    """Where cells around these times begin and end."""
    times = np.asarray(centres, np.float64)
    between = (times[1:] + times[:-1]) / 2
    first, last = (times[0], times[-1]) if len(times) < 2 else (2 * times[0] - between[0], 2 * times[-1] - between[-1])
    return np.concatenate([[first], between, [last if last > first else first + 1]])


def _title(found: Curves, name: str) -> str:
    return f"{name} · {found.length}"


_CELL = 96  # pixels of a picture's longer side
_GAP = 4
_ACROSS, _DOWN = 12, 6  # pictures and moments of the strip
_GRID, _FILMED = 6, 24  # pictures in a row of the film, and in all
_PAPER, _INK, _FAINT = (255, 255, 255), (30, 30, 30), (225, 225, 225)
_LIGHT = (255, 196, 0)
_DARK = 0.22  # brightness of what is not held
_WIDEST_LINE = 860  # pixels that the legend takes
_FRAME_MS = 160  # of the film
_LAST_MS = 2500

_LEGEND = "bright: held by all layers and heads · dark: by none · white: not seen yet"
_CHOSEN = "of each stretch of the stream the frame that was held most"

Pixels = NDArray[np.uint8]


def lit(pixels: Pixels, shares: Shares) -> Pixels:
    """A picture whose patches are as bright as they are held.

    Args:
        pixels: [H, W, 3].
        shares: [rows, columns] in 0 … 1; the patches cover the whole picture.

    Returns:
        [H, W, 3]: its own colours where every layer and head holds the patch, nearly black where none does. In
        between, brightness goes with the root of the share, so that the few that hold a patch can be seen.
    """
    height, width = pixels.shape[:2]
    rows = np.arange(height) * shares.shape[0] // height
    columns = np.arange(width) * shares.shape[1] // width
    light = _DARK + (1 - _DARK) * np.sqrt(np.clip(shares, 0, 1))
    grey = pixels.mean(-1, keepdims=True)
    held = np.sqrt(np.clip(shares, 0, 1))[rows][:, columns, None]
    found: Pixels = ((held * pixels + (1 - held) * grey) * light[rows][:, columns, None]).astype(np.uint8)
    return found


def write_strip(found: Analysis, name: str, path: Path) -> Path:
    """Write a PNG: a row for each moment, a column for the frame that was held most of each stretch of the stream."""
    shown = most_held(found, _ACROSS)
    count = min(_DOWN, len(found.moments))
    moments = [found.moments[(i + 1) * len(found.moments) // count - 1] for i in range(count)]  # up to the last
    width, height = _cell_size(shown[0])
    left, top = 92, 62
    size = (max(_WIDEST_LINE, left + len(shown) * (width + _GAP)), top + len(moments) * (height + _GAP) + 26)
    page = _Page(size)
    page.text((8, 6), _headline(found, name), heading=True)
    page.text((8, 30), "frame at")
    for column, picture in enumerate(shown):
        x = left + column * (width + _GAP)
        page.text((x + 2, 30), _clock(picture.pts_seconds))
        for row, moment in enumerate(moments):
            page.cell((x, top + row * (height + _GAP)), picture, moment, (width, height))
    for row, moment in enumerate(moments):
        page.text((8, top + row * (height + _GAP) + height // 2 - 16), f"after\n{_clock(moment.pts_seconds)}")
    page.text((8, size[1] - 22), f"{_LEGEND} · shown: {_CHOSEN}")
    with writing(path):
        page.image.quantize(256, Image.Quantize.FASTOCTREE).save(path, optimize=True)
    return path


def write_film(found: Analysis, name: str, path: Path) -> Path:
    """Write an animated WebP: the frames that were held most, and below them what is held of every frame."""
    first, *others = _film_pages(found, name)
    durations = [_FRAME_MS] * len(others) + [_LAST_MS]
    with writing(path):
        first.save(path, save_all=True, append_images=others, duration=durations, loop=0, quality=70, method=4)
    return path


def _film_pages(found: Analysis, name: str) -> Iterator[Image.Image]:
    shown = most_held(found, _FILMED)
    width, height = _cell_size(shown[0])
    across = min(_GRID, len(shown))
    down = -(-len(shown) // across)
    top, label, bars = 52, 18, 90
    wide = max(640, 16 + across * (width + _GAP))
    left = (wide - across * (width + _GAP)) // 2
    below = top + down * (height + label + _GAP)
    highest = max(float(moment.frames.max()) for moment in found.moments) or 1.0  # it may all be text
    for moment in found.moments:
        page = _Page((wide, below + bars + 50))
        page.text((8, 6), _headline(found, name), heading=True)
        page.text((8, 28), f"after {_clock(moment.pts_seconds)}: step {moment.step + 1} of {found.steps}")
        for index, picture in enumerate(shown):
            x, y = left + index % across * (width + _GAP), top + index // across * (height + label + _GAP)
            page.cell((x, y), picture, moment, (width, height))
            page.text((x + 2, y + height), _clock(picture.pts_seconds), faint=moment.step < picture.step)
        page.text((8, below + 2), "share of every frame's patches that is held, oldest frame on the left")
        page.bars((8, below + 24, wide - 8, below + 24 + bars), moment, found.steps, highest)
        yield page.image


class _Page:
    """A white sheet to put pictures and words on."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.image = Image.new("RGB", size, _PAPER)
        self._draw = ImageDraw.Draw(self.image)

    def text(self, place: tuple[int, int], words: str, *, heading: bool = False, faint: bool = False) -> None:
        ink = (170, 170, 170) if faint else _INK
        self._draw.text(place, words, fill=ink, font=ImageFont.load_default(15 if heading else 13))

    def cell(self, place: tuple[int, int], picture: Picture, moment: Moment, size: tuple[int, int]) -> None:
        """A picture as it is held at a moment, or an empty frame where it has not been seen yet."""
        x, y = place
        if picture.step > moment.step:
            self._draw.rectangle((x, y, x + size[0] - 1, y + size[1] - 1), outline=_FAINT)
            return
        large = np.asarray(Image.fromarray(picture.pixels).resize(size, Image.Resampling.BILINEAR))
        self.image.paste(Image.fromarray(lit(large, moment.patches[picture.step])), place)

    def bars(self, box: tuple[int, int, int, int], moment: Moment, steps: int, highest: float) -> None:
        """A bar for each frame so far."""
        left, top, right, bottom = box
        self._draw.rectangle((left, top, right, bottom), fill=(245, 245, 245))
        each = (right - left) / steps
        for step, share in enumerate(moment.frames):
            x, high = left + step * each, (bottom - top) * float(share) / highest
            if high:
                self._draw.rectangle((x, bottom - high, max(x, x + each - 1), bottom), fill=_LIGHT)
        now = left + len(moment.frames) * each
        self._draw.line((now, top, now, bottom), fill=_INK)
        self.text((left + 2, top), f"{100 * highest:.0f} %", faint=True)


def most_held(found: Analysis, count: int) -> list[Picture]:
    """Of each of so many equal stretches of the stream the frame that was held most, all moments added up."""
    total = np.zeros(found.steps, np.float32)
    for moment in found.moments:
        total[: moment.step + 1] += moment.frames
    stretches = np.array_split(np.arange(found.steps), min(count, found.steps))
    return [found.pictures[steps[int(total[steps].argmax())]] for steps in stretches]


def _cell_size(picture: Picture) -> tuple[int, int]:
    height, width = picture.pixels.shape[:2]
    scale = _CELL / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _headline(found: Analysis, name: str) -> str:
    return (
        f"{name}: what {min(found.budget, found.tokens)} keys for each layer and KV head hold of {found.tokens} tokens"
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)}:{rest:04.1f}" if seconds % 1 else f"{int(minutes)}:{int(rest):02d}"
