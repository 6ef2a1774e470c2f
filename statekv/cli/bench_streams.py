"""`statekv bench prefill | answer | sessions | video`: what a stream costs as it grows, and several at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from statekv.cli import options
from statekv.cli.bench import names, numbers
from statekv.cli.console import notes, progress
from statekv.cli.report import Report
from statekv.config import Config
from statekv.errors import MemoryLimitError

if TYPE_CHECKING:
    from statekv.bench.rows import Row

_DEFAULT = Config()

StepTokens = Annotated[int, typer.Option(help="Tokens of a step.", min=1)]
Layers = Annotated[int | None, typer.Option(help="Measure the first so many layers; rows say so.")]


def prefill(
    models: options.Sizes = None,
    budgets: options.Budgets = "256,1024,4096,16384",
    steps: Annotated[str, typer.Option(help="Step numbers, with commas.")] = "1,4,16,64,256,1024,3600",
    tokens: StepTokens = 256,
    layers: Layers = None,
    plain: Annotated[bool, typer.Option("--plain", help="Also step without CUDA graphs and packed weights.")] = False,
    runs: options.Runs = 20,
    seconds: Annotated[float, typer.Option(help="Most seconds for one method at one step; less runs then.")] = 60.0,
    device: options.BenchDevice = "auto",
    dtype: options.BenchDtype = "auto",
    csv: options.Csv = None,
    picture: options.Picture = None,
) -> None:
    """Time a step against its number, for full and for statekv at each budget; far steps start from filled caches."""
    from statekv.bench.place import place
    from statekv.bench.prefill import Plan, measure, panels
    from statekv.bench.sizes import size_of

    where, kind = place(device, dtype)
    sizes = [size_of(name, layers) for name in names(models)]
    carried, wanted = tuple(numbers("budgets", budgets)), tuple(numbers("steps", steps))
    plans = {size.name: Plan(size, wanted, carried, tokens, runs, seconds, plain) for size in sizes}
    report = Report("prefill", csv, picture)
    rows = _each(plans, lambda name: measure(plans[name], device=where, dtype=kind))
    report.publish("prefill", rows, panels(rows), where)


def answer(
    models: options.Sizes = None,
    steps: Annotated[str, typer.Option(help="Lengths of the stream in steps, with commas.")] = "1,4,16,64,256,1024",
    tokens: StepTokens = 256,
    question: Annotated[int, typer.Option(help="Tokens of the question.", min=1)] = 32,
    answer: Annotated[int, typer.Option(help="Tokens of the answer.", min=2)] = 16,
    layers: Layers = None,
    runs: options.Runs = 20,
    device: options.BenchDevice = "auto",
    dtype: options.BenchDtype = "auto",
    csv: options.Csv = None,
    picture: options.Picture = None,
) -> None:
    """Time an answer's first token and each further one, against the length of the stream."""
    from statekv.bench.answer import Plan, measure, panels
    from statekv.bench.floor import Machine
    from statekv.bench.place import place
    from statekv.bench.sizes import size_of

    where, kind = place(device, dtype)
    sizes = [size_of(name, layers) for name in names(models)]
    lengths = tuple(numbers("steps", steps))
    plans = {size.name: Plan(size, lengths, tokens, question, answer, runs) for size in sizes}
    report = Report("answer", csv, picture)
    machine = Machine.measured(where, kind)
    rows = _each(plans, lambda name: measure(plans[name], device=where, dtype=kind, machine=machine))
    rates = f"products at {machine.flops / 1e9:.0f} GFLOP/s, memory at {machine.read / 1e9:.1f} GB/s"
    report.publish(f"answer, {rates}", rows, panels(rows), where)


def sessions(
    models: Annotated[str, typer.Option(help="Language models in real size, or demo, with commas.")] = "demo",
    count: Annotated[str, typer.Option("--sessions", help="How many sessions, with commas.")] = "1,2,4,8",
    budget: options.Budget = 1024,
    tokens: Annotated[int | None, typer.Option(help="Tokens of a step; by default the model's own.", min=1)] = None,
    layers: Layers = None,
    runs: options.Runs = 20,
    seconds: Annotated[float, typer.Option(help="Most seconds for one way with one number; less runs then.")] = 600.0,
    device: options.BenchDevice = "auto",
    dtype: options.BenchDtype = "auto",
    csv: options.Csv = None,
    picture: options.Picture = None,
) -> None:
    """Step several sessions as one batch and in turn, all of them with full carried caches."""
    from statekv.bench.place import place
    from statekv.bench.sessions import DEMO, Plan, measure, panels

    where, kind = place(device, dtype)
    chosen = [name if name == DEMO else names(name)[0] for name in dict.fromkeys(models.replace(" ", "").split(","))]
    numbered = tuple(numbers("sessions", count))
    plans = {name: Plan(name, numbered, budget, tokens, layers, runs, seconds) for name in chosen}
    report = Report("sessions", csv, picture)
    rows = _each(plans, lambda name: measure(plans[name], device=where, dtype=kind))
    report.publish("sessions, ms per step of one session", rows, panels(rows), where)


def video(
    file: Annotated[Path, typer.Argument(help="A video file.", show_default=False)],
    model: options.Model = "demo",
    method: options.Method = None,
    budget: options.Budget = _DEFAULT.budget,
    fps: options.Fps = 1.0,
    max_frames: options.MaxFrames = None,
    runs: options.Runs = 5,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    csv: options.Csv = None,
    picture: options.Picture = None,
) -> None:
    """Watch FILE with decoding in line and overlapped, and show where the time goes."""
    import statekv
    from statekv.bench.video import measure
    from statekv.video.source import check_file

    settings: dict[str, Any] = {"budget": budget, "fps": fps, "max_frames": max_frames}
    Config.of(method, **settings)
    check_file(file)
    report = Report("video", csv, picture)
    engine = statekv.load(model, method, device=device, dtype=dtype, **settings)
    rows, panels = measure(engine, file, runs)
    report.publish(f"video, {model}", rows, panels, engine.model.model.device)


def _each(models: Iterable[str], measure: Callable[[str], list[Row]]) -> list[Row]:
    """The rows of all models; one that does not fit in memory is named and left out.

    Raises:
        MemoryLimitError: none of them fits.
    """
    rows: list[Row] = []
    refused: list[MemoryLimitError] = []
    with progress() as bar:
        for name in bar.track(list(models), description="models"):
            try:
                rows += measure(name)
            except MemoryLimitError as error:
                refused.append(error)
    if refused and not rows:
        raise refused[0]
    for reason in refused:
        notes.print(f"statekv: left out: {reason}", markup=False, soft_wrap=True)
    return rows
