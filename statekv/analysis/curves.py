"""The analysis drawn as curves, in the paper's layout, and the carried cache as a map of time against time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from statekv.analysis.concentration import BUDGETS
from statekv.analysis.watching import Analysis
from statekv.drawing import check_drawing

_LAYER_COLORS = "viridis"


def draw_curves(found: Analysis, name: str, folder: Path) -> list[Path]:
    """Write concentration.png, recall.png and churn.png (the paper's figures 6, 7, 8), and held-map.png.

    Args:
        found: the analysis.
        name: of the model, for titles.
        folder: where the files go.

    Returns:
        The files.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    check_drawing()
    pictures = {
        "concentration.png": _by_layer(found, name, "captured", "historical attention captured by the best B keys"),
        "recall.png": _by_layer(found, name, "recall", "weighted recall in the candidate pool"),
        "churn.png": _over_layers(found, name),
        "held-map.png": _held_map(found, name),
    }
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for file, figure in pictures.items():
        FigureCanvasAgg(figure).print_png(str(folder / file))
    return [folder / file for file in pictures]


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    return figure, figure.add_subplot()


def _by_layer(found: Analysis, name: str, field: str, label: str) -> Any:
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
        axes.plot(
            [],
            [],
            "*",
            color="white",
            markeredgecolor="black",
            label=f"caught by the carried cache, budget {found.budget}",
        )
        figure.legend(frameon=False, loc="outside upper center")
    _budget_axis(axes, found)
    axes.set(ylabel=label, title=_title(found, name))
    bar = figure.colorbar(ScalarMappable(depth, colormaps[_LAYER_COLORS]), ax=axes, label="layer")
    bar.ax.yaxis.get_major_locator().set_params(integer=True)
    return figure


def _over_layers(found: Analysis, name: str) -> Any:
    figure, axes = _figure(5.6, 4.4)
    mean = found.mean_shares()
    axes.plot(BUDGETS, mean.retention, "o-", color="C0", label="retention")
    axes.plot(BUDGETS, mean.churn, "s-", color="C1", label="churn")
    axes.plot(BUDGETS, mean.recall, "^-", color="C2", label="weighted recall")
    _budget_axis(axes, found)
    axes.set(ylabel="fraction, mean over layers", title=_title(found, name))
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure


def _budget_axis(axes: Any, found: Analysis) -> None:
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
    image = axes.pcolormesh(_edges(moments), _edges(seconds), shares, cmap="magma", vmin=0, vmax=_top(shares))
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


def _top(shares: Any) -> float:
    """The brightest colour: a few frames that are held whole, the newest above all, must not darken the others."""
    return max(0.05, float(np.nanquantile(shares, 0.99)))


def _title(found: Analysis, name: str) -> str:
    return f"{name} · {found.frames} frames, {found.tokens} tokens"
