"""`statekv analyze`: where a model's attention goes in a video or a text, and what the carried cache holds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from statekv.cli import options
from statekv.cli.console import doing, load, notes, out, progress, remark, to_json
from statekv.config import SETTINGS, Config
from statekv.errors import ConfigError

if TYPE_CHECKING:
    from statekv.analysis.concentration import Curves
    from statekv.analysis.holdings import Analysis

# Of answers and of memory that is short nothing is shown, and both streams take one step at a time.
_NOT = ("recall", "on_horizon", "uniform", "gate", "max_lag_seconds", "reconnect_seconds", "vision_batch")
_SETTINGS = [
    name for name, setting in SETTINGS.items() if setting.panel not in ("Answers", "Memory") and name not in _NOT
]


# What says how keys are chosen; the rest is of frames, or of the prompt around them.
_OF_TEXT = [
    *(name for name in _SETTINGS if SETTINGS[name].panel == "Method" and name not in ("reduce", "pin_prefix")),
    *("horizon", "kernel"),
]
_NOT_OF_TEXT = ("device_map", "revision", "trust_remote_code")
_FRAMES = 128


@options.generated(_SETTINGS, max_frames=options.Default(_FRAMES))
def analyze(
    video: Annotated[str | None, typer.Argument(help="A video file or URL.", show_default=False)] = None,
    *,
    text: Annotated[
        Path | None,
        typer.Option(help="Read FILE in place of a video; --model is then a language model's folder or GGUF file."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the text that are read.", min=1)] = 2048,
    step: Annotated[int, typer.Option(help="Tokens of the text in a step.", min=1)] = 64,
    layers: Annotated[str | None, typer.Option(help="Layers to look at, with commas; all if left out.")] = None,
    folder: Annotated[Path, typer.Option("--out", help="Where tables and pictures go.")] = Path("statekv-analysis"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of the table.")] = False,
    loading: options.Loading,
    method: options.Method = None,
    settings: options.Settings,
) -> None:
    """Show where attention goes in VIDEO, how long it stays there, and which patches are carried on."""
    from statekv.evals.data import make_folder

    if (video is None) == (text is None):
        given = "no video and no text is given" if video is None else f"the video {video} and the text {text} are given"
        raise ConfigError(f"{given}, but one of them is needed", "name a video, or a text by --text")
    Config.of(method, **settings)
    chosen = None if layers is None else _numbers(layers)
    words = None if text is None else _checked_text(text, settings, loading)
    if video is not None:
        _check_video(video)
    make_folder(folder)
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{folder} cannot be written to", "name another")
    if video is not None:
        name, found = _watch(video, method, settings, loading, chosen)
    else:
        assert words is not None
        lasting = {name: loading[name] for name in _OF_TEXT if name in loading}
        config = Config.of(method, **lasting, **{name: settings[name] for name in _OF_TEXT if name in settings})
        name, found = _read(words, config, loading, (tokens, step), chosen)
    _publish(found, name, folder, as_json)


def _watch(
    video: str, method: str | None, settings: options.Settings, loading: options.Loading, layers: list[int] | None
) -> tuple[str, Curves]:
    """The model's name, and what was found in a video."""
    engine = load(**loading, method=method, **settings)
    from statekv.analysis.holdings import analyse

    with progress() as bar:
        task = bar.add_task("frames", total=None)
        found = analyse(
            engine,
            video,
            max_frames=settings["max_frames"],
            layers=layers,
            on_step=lambda frames: bar.update(task, completed=frames),
        )
    return Path(loading.get("model", "demo")).name, found


def _check_video(video: str) -> None:
    from statekv.video.address import check_file, local_path

    path = local_path(video)
    if path is not None:
        check_file(path)


def _checked_text(text: Path, settings: Mapping[str, Any], loading: Mapping[str, Any]) -> str:
    """What is in a file; a ConfigError where it cannot be read, or something was said that only frames have."""
    from statekv.bench.pretrained import read_text

    said = {name: value for name, value in settings.items() if (name, value) != ("max_frames", _FRAMES)}
    for name in (*said, *(name for name in _NOT_OF_TEXT if name in loading)):
        if name not in _OF_TEXT:
            raise ConfigError(f"`{name}` is of videos, and means nothing with a text", f"leave `{name}` out")
    return read_text(text)


def _read(
    words: str, config: Config, loading: Mapping[str, Any], lengths: tuple[int, int], layers: list[int] | None
) -> tuple[str, Curves]:
    """The model's name, and what was found in the first so many tokens of a text, in steps of so many."""
    import torch

    from statekv.analysis.reading import read
    from statekv.bench.harness import place
    from statekv.models.families.text import load_text

    tokens, step = lengths
    model, (where, kind) = loading.get("model"), place(loading.get("device", "auto"), loading.get("dtype", "auto"))
    with doing("loading the model"):
        loaded, encode, name = load_text(None if model is None else Path(model), where, kind)
    ids = torch.tensor([encode(words)[:tokens]], dtype=torch.int64, device=where)
    if ids.shape[1] < tokens:
        raise ConfigError(f"the text has {ids.shape[1]} tokens, but tokens is {tokens}", "read less, or another text")
    with progress() as bar:
        task = bar.add_task("tokens", total=tokens)
        found = read(loaded, config, ids, step, layers=layers, on_step=lambda seen: bar.update(task, completed=seen))
    return name, found


def _publish(found: Curves, name: str, folder: Path, as_json: bool) -> None:
    from statekv.analysis.holdings import Analysis
    from statekv.analysis.plots import draw_curves, write_film, write_strip
    from statekv.analysis.tables import summary, write_tables

    files = [*write_tables(found, folder), *draw_curves(found, name, folder)]
    if isinstance(found, Analysis):
        files += [write_strip(found, name, folder / "held-strip.png"), write_film(found, name, folder / "held.webp")]
    if as_json:
        typer.echo(to_json({"model": name, **summary(found), "files": [str(file) for file in files]}, indent=2))
    else:
        _show(found)
        if isinstance(found, Analysis):
            _show_end(found)
    if found.budget >= found.tokens:
        told = f"budget {found.budget} holds all {found.tokens} tokens of the stream, so nothing was let go"
        remark(f"{told} (--budget {max(1, found.tokens // 10)} would be a tenth)")
    notes.print(f"in {folder}: {', '.join(file.name for file in files)}", markup=False, soft_wrap=True)


def _show(found: Curves) -> None:
    from statekv.analysis.concentration import BUDGETS

    mean = found.mean_shares()
    title = f"{found.length}; shares in %, mean over {len(found.shares)} layers"
    table = Table(title=title, title_justify="left")
    for heading in ("budget", "captured", "weighted recall", "retention", "churn"):
        table.add_column(heading, justify="right")
    for budget, *shares in zip(BUDGETS, mean.captured, mean.recall, mean.retention, mean.churn, strict=True):
        table.add_row(str(budget), *(f"{100 * share:.1f}" for share in shares))
    out().print(table)
    held = f"The carried cache of {found.budget} captured {100 * mean.carried:.1f} % of the historical attention"
    out().print(f"{held}; the best choice of as many keys would have captured {100 * mean.best:.1f} %.")


def _show_end(found: Analysis) -> None:
    told = f"At the end {100 * found.moments[-1].text:.0f} % of the carried cache is text (prompt, marks around frames)"
    out().print(f"{told}; of the stream {100 * found.text:.0f} %.")


def _numbers(text: str) -> list[int]:
    try:
        return [int(piece) for piece in text.split(",")]
    except ValueError:
        raise ConfigError(f"layers is {text!r}, must be numbers with commas", "for example 0,5,11") from None
