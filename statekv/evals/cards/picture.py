"""Time per step against step number, drawn: flat where the carried cache is bounded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from statekv.drawing import check_drawing
from statekv.evals.cards.compare import MethodResult

_SMOOTHED_OVER = 16  # steps


def draw_step_times(results: Sequence[MethodResult], path: Path, title: str) -> None:
    """Write a PNG with one line per method, the median over the videos.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    check_drawing()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for result in results:
        per_step = np.median(np.asarray(result.step_ms), axis=0)  # [steps]
        pieces = max(1, len(per_step) // _SMOOTHED_OVER)
        smooth = [float(np.median(piece)) for piece in np.array_split(per_step, pieces)]
        steps = [float(piece.mean()) + 1 for piece in np.array_split(np.arange(len(per_step)), pieces)]
        axes.plot(steps, smooth, label=result.method, linewidth=2 if result.method in ("full", "statekv") else 1)
    axes.set(xlabel="step (frame)", ylabel="language model, ms per step", title=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))
