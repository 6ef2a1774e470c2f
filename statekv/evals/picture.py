"""Accuracy against the cost of prefill, drawn: a line for each method through its budgets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from statekv.drawing import check_drawing
from statekv.errors import ConfigError
from statekv.evals.report import Figures
from statekv.evals.task import REFERENCE

_GIGA = 1e9
_PAPER = "statekv"  # what all others are there for is drawn stronger
_APART = 1.02  # methods of about equal cost are drawn beside each other


def draw(figures: Sequence[Figures], path: Path) -> None:
    """Write a PNG of runs on one task and model.

    Raises:
        ConfigError: matplotlib is not installed, or there is nothing to draw, or the runs are of several tasks or
            models.
    """
    check_drawing()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figures = [run for run in figures if run.questions]
    title = _title(figures)
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axes = figure.add_subplot()
    for number, method in enumerate(dict.fromkeys(run.method for run in figures)):
        _draw_method(axes, method, figures, f"C{number % 10}")
    chance = 100 * figures[0].chance
    axes.axhline(chance, color="0.6", linewidth=0.8, linestyle=":")
    axes.annotate("guessing", (1.0, chance), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    axes.set_xscale("log")
    axes.set(
        xlabel="prefill of one video through the language model, GFLOP (by formula)",
        ylabel=f"{next(iter(figures[0].headlines))}, %, with 95 % intervals",
        title=title,
    )
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))


def _draw_method(axes: Any, method: str, figures: Sequence[Figures], color: str) -> None:
    runs = sorted((run for run in figures if run.method == method), key=lambda run: run.flops)
    costs, values = [_aside(run, figures) for run in runs], [100 * _first(run) for run in runs]
    # A figure may lie outside of its resampled ones where videos are few.
    below = [max(0.0, 100 * (_first(run) - run.low)) for run in runs]
    above = [max(0.0, 100 * (run.high - _first(run))) for run in runs]
    marker, size = ("*", 11) if method == REFERENCE else ("o", 6)
    width = 2.5 if method == _PAPER else 1.2
    looks = {"marker": marker, "markersize": size, "linewidth": width, "capsize": 2, "elinewidth": 0.8, "color": color}
    axes.errorbar(costs, values, [below, above], label=method, **looks)
    for cost, value, run in zip(costs, values, runs, strict=True):
        if run.budget is not None:
            axes.annotate(f" {run.budget}", (cost, value), fontsize=7, va="bottom")
    if method == REFERENCE:
        axes.axhline(values[0], color="0.6", linewidth=0.8, linestyle="--")


def _aside(run: Figures, figures: Sequence[Figures]) -> float:
    """Its cost in GFLOP, moved a little behind those that cost the same and come before it."""
    before = figures[: figures.index(run)]
    return run.flops / _GIGA * _APART ** sum(abs(other.flops / run.flops - 1) < _APART - 1 for other in before)


def _first(run: Figures) -> float:
    return next(iter(run.headlines.values()))


def _title(figures: Sequence[Figures]) -> str:
    places = {(run.task, run.variant, run.model) for run in figures}
    if len(places) != 1:
        told = "; ".join(", ".join(part for part in place if part) for place in sorted(places)) or "nothing"
        raise ConfigError(f"the results are of {told}", "give those of one task and model")
    questions = max(run.questions for run in figures)
    return f"{', '.join(part for part in places.pop() if part)}: {questions} questions, numbers are budgets"
