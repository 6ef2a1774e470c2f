"""`statekv demo`: every method on synthetic videos, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

import statekv
from statekv.cli import options
from statekv.cli.console import notes, out, progress
from statekv.config import Config

if TYPE_CHECKING:
    from statekv.evals.cards.compare import MethodResult


@options.generated(("budget",), budget=options.Default(None, "A tenth of a video's if left out."))
def demo(
    *,
    videos: Annotated[int, typer.Option(help="How many videos.", min=1)] = 10,
    frames: Annotated[int, typer.Option(help="Frames of each video, at one a second.", min=20)] = 512,
    folder: Annotated[Path, typer.Option(help="Where videos and picture go.")] = Path("statekv-demo"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of the table.")] = False,
    settings: options.Settings,
) -> None:
    """Write synthetic videos, question them with every method, show accuracy, time and memory side by side."""
    Config.of("streaming_llm", **settings)  # the strictest of the methods
    engine = statekv.load("demo")
    from statekv.evals.cards.compare import compare, draw_step_times

    tokens = engine.model.max_positions(frames, 64, 64, "hf")
    chosen = settings.get("budget", tokens // 10)
    with progress() as bar:
        task = bar.add_task("videos", total=videos)
        results = compare(
            engine, folder, videos=videos, frames=frames, budget=chosen, on_video=lambda _: bar.advance(task)
        )
    picture = folder / "step-time.png"
    draw_step_times(results, picture, f"{frames} frames, {tokens} tokens, budget {chosen}")
    if as_json:
        told = {"videos": videos, "frames": frames, "tokens": tokens, "budget": chosen}
        typer.echo(json.dumps({**told, "methods": [result.summary() for result in results]}, indent=2))
    else:
        _show(results, f"{videos} videos of {frames} frames ({tokens} tokens each), budget {chosen}")
    notes.print(f"time per step: {picture}    a video to ask: {folder / 'cards-0.mp4'}", soft_wrap=True)


def _show(results: list[MethodResult], title: str) -> None:
    table = Table(title=title, title_justify="left")
    for heading in ("method", "accuracy", "KL to full", "ms/step 1st tenth", "last tenth", "carried", "carried KiB"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for result in results:
        table.add_row(
            result.method,
            f"{100 * result.accuracy():.1f} %",
            f"{sum(result.kl) / len(result.kl):.3f}",
            f"{result.tenth_ms(0):.2f}",
            f"{result.tenth_ms(9):.2f}",
            str(result.carried),
            f"{(result.bytes_carried or result.bytes_detailed) / 1024:.0f}",
        )
    out().print(table)
    asked = len(results[0].rows)
    out().print(f"{asked} questions; guessing would get {100 * results[0].chance():.1f} %.")
