"""`statekv analyze`: where a model's attention goes in a video, and what the carried cache holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from statekv.cli import options
from statekv.cli.console import load, notes, out, progress, remark, to_json
from statekv.config import SETTINGS, Config
from statekv.errors import ConfigError

if TYPE_CHECKING:
    from statekv.analysis.holdings import Analysis

# Of answers and of memory that is short nothing is shown, and both streams take one step at a time.
_NOT = ("recall", "on_horizon", "uniform", "gate", "max_lag_seconds", "reconnect_seconds", "vision_batch")
_SETTINGS = [
    name for name, setting in SETTINGS.items() if setting.panel not in ("Answers", "Memory") and name not in _NOT
]


@options.generated(_SETTINGS, max_frames=options.Default(128))
def analyze(
    video: options.Video,
    *,
    layers: Annotated[str | None, typer.Option(help="Layers to look at, with commas; all if left out.")] = None,
    folder: Annotated[Path, typer.Option("--out", help="Where tables and pictures go.")] = Path("statekv-analysis"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of the table.")] = False,
    loading: options.Loading,
    method: options.Method = None,
    settings: options.Settings,
) -> None:
    """Show where attention goes in VIDEO, how long it stays there, and which patches are carried on."""
    from statekv.evals.data import make_folder
    from statekv.video.address import check_file, local_path

    Config.of(method, **settings)
    chosen = None if layers is None else _numbers(layers)
    path = local_path(video)
    if path is not None:
        check_file(path)
    make_folder(folder)
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{folder} cannot be written to", "name another")
    engine = load(**loading, method=method, **settings)
    from statekv.analysis.holdings import analyse

    with progress() as bar:
        task = bar.add_task("frames", total=None)
        found = analyse(
            engine,
            video,
            max_frames=settings["max_frames"],
            layers=chosen,
            on_step=lambda frames: bar.update(task, completed=frames),
        )
    _publish(found, Path(loading.get("model", "demo")).name, folder, as_json)


def _publish(found: Analysis, name: str, folder: Path, as_json: bool) -> None:
    from statekv.analysis.plots import draw_curves, write_film, write_strip
    from statekv.analysis.tables import summary, write_tables

    files = [
        *write_tables(found, folder),
        *draw_curves(found, name, folder),
        write_strip(found, name, folder / "held-strip.png"),
        write_film(found, name, folder / "held.webp"),
    ]
    if as_json:
        typer.echo(to_json({"model": name, **summary(found), "files": [str(file) for file in files]}, indent=2))
    else:
        _show(found)
    if found.budget >= found.tokens:
        told = f"budget {found.budget} holds all {found.tokens} tokens of the stream, so nothing was let go"
        remark(f"{told} (--budget {max(1, found.tokens // 10)} would be a tenth)")
    notes.print(f"in {folder}: {', '.join(file.name for file in files)}", markup=False, soft_wrap=True)


def _show(found: Analysis) -> None:
    from statekv.analysis.concentration import BUDGETS

    mean = found.mean_shares()
    title = f"{found.frames} frames, {found.tokens} tokens; shares in %, mean over {len(found.shares)} layers"
    table = Table(title=title, title_justify="left")
    for heading in ("budget", "captured", "weighted recall", "retention", "churn"):
        table.add_column(heading, justify="right")
    for budget, *shares in zip(BUDGETS, mean.captured, mean.recall, mean.retention, mean.churn, strict=True):
        table.add_row(str(budget), *(f"{100 * share:.1f}" for share in shares))
    out().print(table)
    held = f"The carried cache of {found.budget} captured {100 * mean.carried:.1f} % of the historical attention"
    out().print(f"{held}; the best choice of as many keys would have captured {100 * mean.best:.1f} %.")
    told = f"At the end {100 * found.moments[-1].text:.0f} % of the carried cache is text (prompt, marks around frames)"
    out().print(f"{told}; of the stream {100 * found.text:.0f} %.")


def _numbers(text: str) -> list[int]:
    try:
        return [int(piece) for piece in text.split(",")]
    except ValueError:
        raise ConfigError(f"layers is {text!r}, must be numbers with commas", "for example 0,5,11") from None
