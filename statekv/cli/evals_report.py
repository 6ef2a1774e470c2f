"""`statekv eval report` and `statekv eval picture`: what result files say."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from statekv.cli.console import notes, out
from statekv.errors import ConfigError

if TYPE_CHECKING:
    from statekv.evals.report import Figures

Paths = Annotated[list[Path], typer.Argument(help="Result files, or folders of them.", show_default=False)]


def report(
    results: Paths,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object for each run instead.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Lines of a CSV file instead.")] = False,
) -> None:
    """Show a row for each method and budget, beside full attention in the same runs and beside the paper."""
    from statekv.evals.report import load

    if as_json and as_csv:
        raise ConfigError("--json and --csv are both given", "choose one")
    found = load(results)
    if as_json:
        typer.echo("\n".join(json.dumps(_plain(run)) for run in found))
    elif as_csv:
        _write_csv(found)
    else:
        for runs in _by_place(found):
            _show(runs)


def picture(
    results: Paths,
    file: Annotated[Path, typer.Option(help="PNG to write.")] = Path("statekv-eval", "accuracy-cost.png"),
) -> None:
    """Draw accuracy against the FLOPs of prefill, a line for each method."""
    from statekv.drawing import check_drawing
    from statekv.evals.picture import draw
    from statekv.evals.report import load

    check_drawing()
    draw(load(results), file)
    notes.print(f"picture: {file}", markup=False, soft_wrap=True)


def _by_place(found: Sequence[Figures]) -> list[list[Figures]]:
    places: dict[tuple[str, str, str], list[Figures]] = {}
    for run in found:
        places.setdefault((run.task, run.variant, run.model), []).append(run)
    return list(places.values())


def _show(runs: Sequence[Figures]) -> None:
    place = ", ".join(part for part in (runs[0].task, runs[0].variant, runs[0].model) if part)
    runs = sorted(runs, key=lambda run: (run.method != "full", run.method, run.budget or 0))
    headline = next(iter(runs[0].headlines))
    columns = {
        "method": [run.method for run in runs],
        "budget": ["" if run.budget is None else str(run.budget) for run in runs],
        f"{headline}, %": [_percent(_first(run)) for run in runs],
        "95 %": [_range(run.low, run.high) for run in runs],
        "− full": [_percent(run.difference, sign=True) for run in runs],
        " 95 % ": [_range(run.difference_low, run.difference_high, sign=True) for run in runs],
        "KL": ["" if run.kl is None else f"{run.kl:.3f}" for run in runs],
        "as full, %": [_percent(run.agreement) for run in runs],
        "GFLOP/video": [f"{run.flops / 1e9:,.0f}" for run in runs],
        "paper, %": [_percent(run.paper, digits=2) for run in runs],
        "failed": [str(len(run.failed) or "") for run in runs],
    }
    table = _table(f"{place}: {_asked(runs)}; guessing gets {_percent(runs[0].chance)} %", columns)
    others = [name for name in runs[0].headlines if name != headline]
    parts = {"method": columns["method"], "budget": columns["budget"]}
    parts |= {name: [_percent(run.headlines.get(name)) for run in runs] for name in others}
    out().print(table)
    if others:
        out().print(_table("parts, %", parts))
    _tell(runs)


def _tell(runs: Sequence[Figures]) -> None:
    """What must be known besides the figures, each thing once."""
    told: dict[str, list[str]] = {}
    for run in runs:
        name = run.method if run.budget is None else f"{run.method} {run.budget}"
        failed = [f"{video} failed: {reason}" for video, reason in run.failed.items()]
        for line in (*failed, *run.notes):
            told.setdefault(line, []).append(name)
    for line, names in told.items():
        whose = "" if len(names) == len(runs) else f" ({', '.join(names)})"
        notes.print(f"statekv: {line}{whose}", markup=False, soft_wrap=True)


def _asked(runs: Sequence[Figures]) -> str:
    counts = {(run.questions, run.videos) for run in runs}
    questions, videos = max(counts)
    told = f"{questions} questions on {videos} videos"
    return told if len(counts) == 1 else f"{told}, fewer for some methods"


def _table(title: str, columns: Mapping[str, Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    shown = {heading: cells for heading, cells in columns.items() if any(cells)}
    for heading in shown:
        table.add_column(heading, justify="left" if heading == "method" else "right", overflow="fold")
    for cells in zip(*shown.values(), strict=True):
        table.add_row(*cells)
    return table


def _first(run: Figures) -> float:
    return next(iter(run.headlines.values()))


def _percent(share: float | None, sign: bool = False, digits: int = 1) -> str:
    if share is None or math.isnan(share):
        return ""
    return f"{100 * share:{'+' if sign else ''}.{digits}f}"


def _range(low: float | None, high: float | None, sign: bool = False) -> str:
    found = [_percent(low, sign), _percent(high, sign)]
    return " … ".join(found) if all(found) else ""


def _plain(run: Figures) -> dict[str, Any]:
    """Numbers that JSON knows; NaN is none."""
    found = asdict(run)
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in found.items()}


def _write_csv(found: Sequence[Figures]) -> None:
    rows = []
    for run in found:
        row = _plain(run)
        headlines = row.pop("headlines")
        rows.append({**row, "failed": len(run.failed), "notes": "; ".join(run.notes), **headlines})
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(sys.stdout, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
