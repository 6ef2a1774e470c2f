"""`statekv film` and `statekv demo`: a synthetic video to begin with, and every method on several, side by side."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from statekv.cli import options
from statekv.cli.console import load, notes, out, progress, remark, to_json
from statekv.config import Config

if TYPE_CHECKING:
    from statekv.evals.cards.compare import MethodResult


FilmFile = Annotated[Path, typer.Argument(help="Where it goes; a file that is there is left as it is.")]


def film(
    file: FilmFile = Path("film.mp4"),
    *,
    seconds: Annotated[float, typer.Option(help="How long it is.", min=2, max=36_000, callback=options.finite)] = 60.0,
    seed: Annotated[int, typer.Option(help="Another one, another film.", min=0)] = 7,
) -> None:
    """Write a film of coloured cards, which is what the demo model knows, to begin with."""
    if file.exists():
        remark(f"{file} is there already, and is left as it is")
        return
    from statekv.evals.cards import write_film, write_story

    with progress() as bar:
        bar.add_task(f"writing {file}", total=None)
        write_film(write_story(seed, seconds), file)
    remark(f'{file} is written; ask it with: statekv ask {file} "how many cards?"')


@options.generated(("budget",), budget=options.Default(None, "A tenth of a video's if left out."))
def demo(
    *,
    videos: Annotated[int, typer.Option(help="How many videos.", min=1, max=10_000)] = 10,
    frames: Annotated[int, typer.Option(help="Frames of each video, at one a second.", min=20, max=36_000)] = 512,
    folder: Annotated[Path, typer.Option(help="Where videos and picture go.")] = Path("statekv-demo"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of the table.")] = False,
    settings: options.Settings,
) -> None:
    """Write synthetic videos, question them with every method, show accuracy, time and memory side by side."""
    Config.of("streaming_llm", **settings)  # the strictest of the methods
    engine = load(model="demo")
    from statekv.evals.cards.compare import compare, draw_step_times

    tokens = engine.model.max_positions(frames, 64, 64, "hf")
    chosen = settings.get("budget", tokens // 10)
    with _not_left_empty(folder), progress() as bar:
        task = bar.add_task("videos", total=videos)
        results = compare(
            engine, folder, videos=videos, frames=frames, budget=chosen, on_video=lambda _: bar.advance(task)
        )
    picture = folder / "step-time.png"
    draw_step_times(results, picture, f"{frames} frames, {tokens} tokens, budget {chosen}")
    if as_json:
        told = {"videos": videos, "frames": frames, "tokens": tokens, "budget": chosen}
        typer.echo(to_json({**told, "methods": [result.summary() for result in results]}, indent=2))
    else:
        _show(results, f"{videos} videos of {frames} frames ({tokens} tokens each), budget {chosen}")
    notes.print(f"time per step: {picture}    a video to ask: {folder / 'cards-0.mp4'}", soft_wrap=True)


@contextmanager
def _not_left_empty(folder: Path) -> Iterator[None]:
    """A folder that the block has made is taken away again where nothing came of it."""
    there = folder.exists()
    try:
        yield
    finally:
        if not there:
            with suppress(OSError):  # not made, or not empty
                folder.rmdir()


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
