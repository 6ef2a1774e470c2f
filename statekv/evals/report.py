"""Result files made into figures: rows beside full attention, intervals, the paper's table, a picture.

How far a benchmark's figure can be trusted: a bootstrap over videos.

Questions of one video share its frames, and a headline may be a mean of means, so that neither the questions'
number nor a normal approximation tells: whole videos are drawn, with replacement, and the headline is computed anew.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from statekv.config import BYTES, METHODS, SETTINGS, Config, bytes_of, told
from statekv.errors import ConfigError, writing
from statekv.evals import open_task
from statekv.evals.paper.table import paper_share
from statekv.evals.results import Results, read
from statekv.evals.task import REFERENCE, Rows, Task


@dataclass
class Run:
    """One configuration's results on one task and model, out of all its shards.

    Attributes:
        first: one of the files; its header speaks for all of them.
        rows: of each video the questions' rows.
        flops: of each video's prefill.
        failed: why other videos failed.
        notes: what a reader of the figures must know.
    """

    first: Results
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def config(self) -> Config:
        """Settings as the file has them; such as are no longer known are left out."""
        facts = self.first.header.config
        return Config.of_facts({name: value for name, value in facts.items() if name in SETTINGS or name == "method"})

    @property
    def method(self) -> str:
        """The method's name, and what was set by hand: never the budget, the horizon only beside on_horizon."""
        config = self.config
        own = METHODS.get(config.method, {"carry": config.carry, "recall": config.recall})
        prescribed = open_task(self.first.header.task).settings
        horizon = config.horizon if config.on_horizon is None else None
        plain = Config(**{"budget": config.budget, "horizon": horizon, **prescribed, **own})
        names = [name for name in SETTINGS if getattr(config, name) != getattr(plain, name)]
        return " ".join([config.method, *(f"{name}={_written(name, getattr(config, name))}" for name in names)])

    @property
    def budget(self) -> int | None:
        """Tokens carried; None where all are."""
        return None if self.config.carry == "all" else self.config.budget

    @property
    def questions(self) -> list[dict[str, Any]]:
        """All rows."""
        return [row for rows in self.rows.values() for row in rows]


@dataclass(frozen=True)
class Figures:
    """What the report says about one run; shares of 1.

    Attributes:
        task, variant, model, method, budget: what was run; no budget where all tokens are carried.
        fps, max_frames: frames per second and frames of a video at most; None: no limit.
        frames: that had been seen when a question was asked; the mean, None where the files do not say.
        failed: why further videos, which are not in the figures, failed.
        headlines: the benchmark's figures by name, the first being the one that is talked about.
        low, high: 95 % interval of the first.
        difference, difference_low, difference_high: of it to full attention's, on questions that both have answered;
            None where full attention was not run.
        kl: mean KL(full ‖ method) of the answers' first tokens, in nats.
        agreement: share of answers that equal full attention's.
        chance: what guessing gets.
        flops: of the language model for one video's prefill, by formula; the mean.
        paper: what the paper reports for the first headline.
        notes: what a reader must know.
    """

    task: str
    variant: str
    model: str
    method: str
    budget: int | None
    fps: float | None
    max_frames: int | None
    frames: float | None
    questions: int
    videos: int
    failed: Mapping[str, str]
    headlines: Mapping[str, float]
    low: float
    high: float
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    kl: float | None
    agreement: float | None
    chance: float
    flops: float
    paper: float | None
    notes: tuple[str, ...]

    @property
    def headline(self) -> float:
        """The figure that is talked about."""
        return next(iter(self.headlines.values()))


def find(paths: Iterable[Path]) -> list[Path]:
    """Result files among files and folders; a ConfigError where there are none."""
    found = []
    for path in paths:
        files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
        if not files or not files[0].exists():
            raise ConfigError(f"there are no results at {path}", "give the --out of statekv eval")
        found += files
    return list(dict.fromkeys(file.resolve() for file in found))


def merge(results: Sequence[Results]) -> list[Run]:
    """Shards of one configuration put together; questions that several have answered count once."""
    runs: dict[str, Run] = {}
    shards: dict[str, list[str]] = {}
    for found in results:
        header = found.header
        key = json.dumps([header.task, header.variant, header.model, header.revision, header.dtype, header.config])
        run = runs.setdefault(key, Run(found))
        shards.setdefault(key, []).append(header.shard)
        _add(run, found)
        if header.versions != run.first.header.versions:
            run.notes.append("shards ran on different versions of packages")
    for key, run in runs.items():
        run.failed = {video: reason for video, reason in run.failed.items() if video not in run.rows}
        run.notes += _missing(shards[key])
    return list(runs.values())


def figures(runs: Sequence[Run]) -> list[Figures]:
    """Figures of each run, beside full attention on the same task and model where that was run."""
    references = {_place(run): run for run in reversed(runs) if run.config.method == REFERENCE}
    return [_figures(run, references.get(_place(run))) for run in runs]


def _figures(run: Run, reference: Run | None) -> Figures:
    header, config, rows = run.first.header, run.config, run.questions
    task = open_task(header.task)
    low, high = interval(run.rows, lambda drawn: _headline(task, drawn))
    return Figures(
        task=header.task,
        variant=header.variant,
        model=header.model,
        method=run.method,
        budget=run.budget,
        fps=config.fps,
        max_frames=config.max_frames,
        frames=_mean([row["frames"] for row in rows if "frames" in row]),
        questions=len(rows),
        videos=len(run.rows),
        failed=run.failed,
        headlines=task.headlines(rows),
        low=low,
        high=high,
        **_differences(task, run, reference),
        kl=_mean([row["kl"] for row in rows if "kl" in row]),
        agreement=_mean([row["agrees"] for row in rows if "agrees" in row]),
        chance=_mean([row["chance"] for row in rows]) or math.nan,
        flops=_mean(list(run.flops.values())) or math.nan,
        paper=paper_share(header.task, header.model, config),
        notes=tuple(run.notes),
    )


def _written(name: str, value: Any) -> str:
    """A setting as it can be given; caps with a unit where that says all."""
    if SETTINGS[name].kind is BYTES and value is not None:
        short = told(value).replace(".0 ", "").replace(" ", "")
        return short if bytes_of(name, short) == value else str(value)
    return str(value)


def _differences(task: Task, run: Run, reference: Run | None) -> dict[str, float | None]:
    names = ("difference", "difference_low", "difference_high")
    if reference is None or reference is run:
        return dict.fromkeys(names)
    ids = {row["id"] for row in run.questions} & {row["id"] for row in reference.questions}
    ours, theirs = (
        {video: kept for video, rows in side.rows.items() if (kept := [row for row in rows if row["id"] in ids])}
        for side in (run, reference)
    )
    if not ids:
        return dict.fromkeys(names)
    found = [_headline(task, [row for rows in side.values() for row in rows]) for side in (ours, theirs)]
    low, high = interval(ours, lambda drawn: _headline(task, drawn), theirs)
    return dict(zip(names, (found[0] - found[1], low, high), strict=True))


def _headline(task: Task, rows: Rows) -> float:
    return next(iter(task.headlines(rows).values()))


def _place(run: Run) -> tuple[str | int | None, ...]:
    """What two runs must share to be compared."""
    header, config = run.first.header, run.config
    return header.task, header.variant, header.model, header.revision, header.dtype, config.layout, config.horizon


def _add(run: Run, found: Results) -> None:
    known = {row["id"]: row["answered"] for row in run.questions}
    twice = [row for row in found.questions if row["id"] in known]
    for row in found.questions:
        if row["id"] not in known:
            run.rows.setdefault(row["video"], []).append(row)
    run.flops = {**{video: line["prefill_flops"] for video, line in found.videos.items()}, **run.flops}
    run.failed |= found.failed
    if twice:
        unlike = sum(row["answered"] != known[row["id"]] for row in twice)
        run.notes.append(f"{len(twice)} questions were answered twice, {unlike} of them differently; the first counts")


def _missing(shards: Sequence[str]) -> list[str]:
    """A note unless some number of shards is complete."""
    found: dict[int, set[int]] = {}
    for shard in shards:
        index, count = map(int, shard.split("/"))
        found.setdefault(count, set()).add(index)
    if any(len(there) == count for count, there in found.items()):
        return []
    count, there = max(found.items())
    return [f"shard {index}/{count} is missing" for index in range(count) if index not in there]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def load(paths: Iterable[Path]) -> list[Figures]:
    """Figures of all result files among files and folders; errors as of `find` and `results.read`."""
    return figures(merge([read(path) for path in find(paths)]))


_DRAWS = 1000
_SEED = 0  # the same videos are drawn for every method


def interval(
    rows: Mapping[str, Rows], figure: Callable[[Rows], float], other: Mapping[str, Rows] | None = None
) -> tuple[float, float]:
    """95 % of the resampled figures, or of their differences to another's, lie between these two.

    Args:
        other: of the same videos; their figure is subtracted, video by video the same ones drawn.

    Returns:
        NaN twice with fewer than two videos.
    """
    names = sorted(rows)
    if len(names) < 2:
        return math.nan, math.nan
    rng = np.random.default_rng(_SEED)
    found = []
    for drawn in rng.integers(len(names), size=(_DRAWS, len(names))):
        taken = [names[index] for index in drawn]
        value = figure([row for name in taken for row in rows[name]])
        if other is not None:
            value -= figure([row for name in taken for row in other[name]])
        found.append(value)
    low, high = np.nanquantile(found, (0.025, 0.975))
    return float(low), float(high)


_GIGA = 1e9
_PAPER = "statekv"  # what all others are there for is drawn stronger
_APART = 1.02  # methods of about equal cost are drawn beside each other


def draw(figures: Sequence[Figures], path: Path) -> None:
    """Write a PNG of runs; a ConfigError where there are none, or they are of several tasks or models."""
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
    axes.set(title=title, xlabel="prefill of one video through the language model, GFLOP (by formula)")
    axes.set_ylabel(f"{next(iter(figures[0].headlines))}, %, with 95 % intervals")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    with writing(path):
        figure.savefig(path)


def _draw_method(axes: Any, method: str, figures: Sequence[Figures], color: str) -> None:
    runs = sorted((run for run in figures if run.method == method), key=lambda run: run.flops)
    costs, values = [_aside(run, figures) for run in runs], [100 * run.headline for run in runs]
    # A figure may lie outside of its resampled ones where videos are few.
    below = [max(0.0, 100 * (run.headline - run.low)) for run in runs]
    above = [max(0.0, 100 * (run.high - run.headline)) for run in runs]
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


def _title(figures: Sequence[Figures]) -> str:
    places = {(run.task, run.variant, run.model) for run in figures}
    if len(places) != 1:
        told = "; ".join(", ".join(part for part in place if part) for place in sorted(places)) or "nothing"
        raise ConfigError(f"the results are of {told}", "give those of one task and model")
    questions = max(run.questions for run in figures)
    return f"{', '.join(part for part in places.pop() if part)}: {questions} questions, numbers are budgets"
