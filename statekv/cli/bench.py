"""`statekv bench …`: questions to the clock."""

from __future__ import annotations

from typing import Annotated

import typer

from statekv.cli import options
from statekv.cli.console import progress
from statekv.cli.report import Report
from statekv.errors import ConfigError

app = typer.Typer(
    name="bench",
    help="Measure what a step, an answer, a video cost, and how far that is from the machine's floor.",
    no_args_is_help=True,
)
_BUDGETS = "256,1024,4096,16384"


@app.command()
def attention(
    models: options.Sizes = None,
    budgets: options.Budgets = _BUDGETS,
    queries: Annotated[int, typer.Option(help="Own tokens of a step.", min=1)] = 256,
    runs: options.Runs = 20,
    peer: options.Peer = None,
    device: options.BenchDevice = "auto",
    dtype: options.BenchDtype = "auto",
    csv: options.Csv = None,
    picture: options.Picture = None,
) -> None:
    """Time attention with key scores in every way, beside stock attention without scores."""
    from statekv.bench.attention import measure, panels, shapes
    from statekv.bench.clock import matmul_rate
    from statekv.bench.peer import load_peer
    from statekv.bench.place import place

    where, kind = place(device, dtype)
    found = shapes(names(models), numbers("budgets", budgets), queries)
    stranger = None if peer is None else load_peer(peer)
    report, rows = Report("attention", csv, picture), []
    rate = matmul_rate(where, kind, rows=queries)
    with progress() as bar:
        for shape in bar.track(found, description="shapes"):
            rows += measure(shape, device=where, dtype=kind, runs=runs, rate=rate, peer=stranger)
    report.publish(f"attention, products at {rate / 1e9:.0f} GFLOP/s", rows, panels(rows), where)


@app.command()
def flops(
    models: options.Sizes = None,
    budgets: options.Budgets = _BUDGETS,
    frames: Annotated[str, typer.Option(help="Lengths of the video, with commas.")] = "64,512,3600",
    csv: options.Csv = None,
    picture: options.Picture = None,
) -> None:
    """Compute a video's prefill FLOPs by method and length, and check the formula against torch's count."""
    import torch

    from statekv.bench.flops import check, measure, panel

    chosen, carried, lengths = names(models), numbers("budgets", budgets), numbers("frames", frames)
    report, rows = Report("flops", csv, picture), []
    with progress() as bar:
        for name in bar.track(chosen, description="models"):
            rows += [check(name, budget, steps=[256] * 3) for budget in (None, 300)]
            rows += measure(name, carried, lengths)
    panels = [panel(name, carried, max(lengths)) for name in chosen]
    report.publish("prefill of the language model", rows, panels, torch.device("cpu"))


@app.command()
def memory(
    models: options.Sizes = None,
    budgets: options.Budgets = _BUDGETS,
    steps: Annotated[str, typer.Option(help="Steps of the stream, with commas.")] = "16,64,256,1024,3600",
    device: options.BenchDevice = "auto",
    dtype: options.BenchDtype = "auto",
    csv: options.Csv = None,
    picture: options.Picture = None,
) -> None:
    """Weigh both caches against the formula, count what growing copies, and find a step's peak."""
    from statekv.bench.memory import carried_row, detailed_rows, panels, peak_rows
    from statekv.bench.place import place

    where, kind = place(device, dtype)
    chosen, carried, counts = names(models), numbers("budgets", budgets), numbers("steps", steps)
    report, rows = Report("memory", csv, picture), []
    with progress() as bar:
        for name in bar.track(chosen, description="models"):
            rows += peak_rows(name, where, kind, carried)
            rows += [carried_row(name, kind, budget) for budget in carried]
            rows += detailed_rows(name, kind, counts)
    report.publish("memory of the language model", rows, panels(rows), where)


def names(models: str | None) -> list[str]:
    """`a,b` → the sizes' names, checked; None: all of them.

    Raises:
        ConfigError: an unknown one.
    """
    from statekv.bench.sizes import SIZES, size_of

    chosen = SIZES if models is None else dict.fromkeys(name.strip() for name in models.split(","))
    return [size_of(name).name for name in chosen]


def numbers(option: str, text: str) -> list[int]:
    """`1,64` → [1, 64], ascending.

    Raises:
        ConfigError: something else than whole numbers of 1 to 7 digits.
    """
    found = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 8 and int(part) for part in found):
        raise ConfigError(f"{option} is {text!r}, but must be numbers from 1 to 9999999", "write them as in 256,1024")
    return sorted({int(part) for part in found})
