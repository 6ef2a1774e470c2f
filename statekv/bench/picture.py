"""Figures against what they depend on: one panel per question, one line per candidate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from statekv.drawing import check_drawing

_PANELS_A_ROW = 4
_INCHES = (3.6, 3.0)  # of a panel


@dataclass(frozen=True)
class Panel:
    """One system of axes.

    Attributes:
        title: above it.
        x, y: what the axes are, with units.
        lines: points (x, y) by name; the same name has the same colour in all panels.
        log_x, log_y: logarithmic axes; a linear one starts at 0.
    """

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    log_x: bool = False
    log_y: bool = False


def draw(panels: Sequence[Panel], path: Path, title: str = "") -> None:
    """Write a PNG.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    check_drawing()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(len(panels), _PANELS_A_ROW)
    down = -(-len(panels) // across)
    size = (max(6.0, _INCHES[0] * across), _INCHES[1] * down + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    handles = {}
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(down, across, index + 1)
        for name, points in panel.lines.items():
            (handles[name],) = axes.plot(*zip(*points, strict=True), marker=".", color=f"C{names.index(name)}")
        axes.set(xlabel=panel.x, ylabel=panel.y, title=panel.title)
        axes.title.set_fontsize("medium")
        axes.set_xscale("log", base=2) if panel.log_x else axes.set_xlim(left=0)
        axes.set_yscale("log") if panel.log_y else axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(6, 2 * across), frameon=False)
    figure.suptitle(title, fontsize="medium", wrap=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))
