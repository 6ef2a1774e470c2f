"""The command line: answers go to standard output, everything else to standard error."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from typer.core import TyperGroup

import statekv
from statekv.config import CARRIES, KERNELS, LAYOUTS, METHODS, RECALLS, Config
from statekv.errors import ConfigError, StateKVError

if TYPE_CHECKING:
    from statekv.demo.compare import MethodResult
    from statekv.session import Session


class _Commands(TyperGroup):
    """Says that it was interrupted; typer alone leaves without a word."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _notes.print("statekv: interrupted", markup=False)
            raise typer.Exit(130) from None


app = typer.Typer(
    name="statekv",
    cls=_Commands,
    help="Watch videos with a frozen video language model at a flat cost per frame, and question them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_notes = Console(stderr=True, highlight=False)
_DEFAULT = Config()
_SETTINGS = (
    "budget",
    "fps",
    "max_frames",
    "max_new_tokens",
    "carry",
    "recall",
    "sinks",
    "pin_prefix",
    "layout",
    "horizon",
    "kernel",
    "seed",
)


def main() -> None:
    """Entry point of the `statekv` command."""
    # Loading bars of transformers would end up between an answer and its reader.
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.showwarning = _show_warning
    try:
        app()
    except StateKVError as error:
        _notes.print(f"statekv: {error}", markup=False, soft_wrap=True)
        raise SystemExit(1) from None


Video = Annotated[str, typer.Argument(help="A video file or URL.", show_default=False)]
Questions = Annotated[list[str], typer.Argument(help="One or more questions.", show_default=False)]
Model = Annotated[str, typer.Option(help="A hub id, a folder, or demo.")]
Method = Annotated[str | None, typer.Option(help=f"One of: {', '.join(METHODS)}.")]
Budget = Annotated[int, typer.Option(help="Tokens carried per layer and KV head.")]
Fps = Annotated[float, typer.Option(help="Frames per second at most.")]
MaxFrames = Annotated[int | None, typer.Option(help="Frames at most, spread over the video.")]
MaxNewTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
Carry = Annotated[str | None, typer.Option(help=f"Keys that go on: {', '.join(CARRIES)}.")]
Recall = Annotated[str | None, typer.Option(help=f"Keys that answers see: {', '.join(RECALLS)}.")]
Sinks = Annotated[int, typer.Option(help="First tokens that sink_recent keeps.")]
PinPrefix = Annotated[bool, typer.Option("--pin-prefix", help="Always carry the prompt's prefix.")]
LayoutName = Annotated[str, typer.Option(help=f"Prompt layout: {', '.join(LAYOUTS)}.")]
Horizon = Annotated[int | None, typer.Option(help="Positions that RoPE is scaled for.")]
Kernel = Annotated[str, typer.Option(help=f"Attention with key scores: {', '.join(KERNELS)}.")]
Seed = Annotated[int, typer.Option(help="Of carry random.")]
VideoStream = Annotated[int | None, typer.Option(help="Which video stream of the file, from 0.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")]
DeviceMap = Annotated[str | None, typer.Option(help="Passed on to transformers, for example auto.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object per answer.")]


@app.command()
def ask(
    video: Video,
    questions: Questions,
    model: Model = "demo",
    method: Method = None,
    budget: Budget = _DEFAULT.budget,
    fps: Fps = 1.0,
    max_frames: MaxFrames = None,
    max_new_tokens: MaxNewTokens = _DEFAULT.max_new_tokens,
    carry: Carry = None,
    recall: Recall = None,
    sinks: Sinks = _DEFAULT.sinks,
    pin_prefix: PinPrefix = False,
    layout: LayoutName = _DEFAULT.layout,
    horizon: Horizon = None,
    kernel: Kernel = _DEFAULT.kernel,
    seed: Seed = _DEFAULT.seed,
    stream: VideoStream = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    device_map: DeviceMap = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Watch VIDEO once, answer every QUESTION about it."""
    given = dict(locals())
    settings = {name: given[name] for name in _SETTINGS if given[name] is not None}
    # Checked before the model is loaded, which takes its time.
    if any(not question.strip() for question in questions):
        raise ConfigError("the question is empty", "ask something about the video")
    Config.of(method, **settings)
    _check_source(video)
    loading = {name: given[name] for name in ("dtype", "device", "device_map", "revision", "trust_remote_code")}
    engine = statekv.load(model, method, **loading, **settings)
    with engine.open(video, stream=stream) as session:
        for question in questions:
            engine.check_question(question)
        _watch(session)
        for question in questions:
            _answer(session, question, model, as_json)


@app.command()
def demo(
    videos: Annotated[int, typer.Option(help="How many videos.", min=1)] = 10,
    frames: Annotated[int, typer.Option(help="Frames of each video, at one a second.", min=20)] = 512,
    budget: Annotated[int | None, typer.Option(help="Carried tokens; a tenth of a video's if left out.")] = None,
    folder: Annotated[Path, typer.Option(help="Where videos and picture go.")] = Path("statekv-demo"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of the table.")] = False,
) -> None:
    """Write synthetic videos, question them with every method, show accuracy, time and memory side by side."""
    if budget is not None:
        Config.of("streaming_llm", budget=budget)  # the strictest of the methods
    engine = statekv.load("demo")
    from statekv.demo.compare import compare
    from statekv.demo.picture import check_drawing, draw_step_times

    check_drawing()
    tokens = engine.model.span(frames, 64, 64, "hf")
    chosen = tokens // 10 if budget is None else budget
    with _progress() as bar:
        task = bar.add_task("videos", total=videos)
        results = compare(
            engine, folder, videos=videos, frames=frames, budget=chosen, on_video=lambda _: bar.advance(task)
        )
    picture = folder / "step-time.png"
    draw_step_times(results, picture, f"{frames} frames, {tokens} tokens, budget {chosen}")
    if as_json:
        settings = {"videos": videos, "frames": frames, "tokens": tokens, "budget": chosen}
        typer.echo(json.dumps({**settings, "methods": [result.summary() for result in results]}, indent=2))
    else:
        _show(results, f"{videos} videos of {frames} frames ({tokens} tokens each), budget {chosen}")
    _notes.print(f"time per step: {picture}    a video to ask: {folder / 'cards-0.mp4'}", soft_wrap=True)


@app.command()
def models() -> None:
    """List the supported model families and what has been tried of them."""
    from statekv.models import FAMILIES
    from statekv.ops import implementation

    table = Table("model", "family", "what has been tested", box=None, pad_edge=False)
    table.add_row("demo", "internvl", "everything, with its own weights (shipped with statekv)")
    for name, family in FAMILIES.items():
        for checkpoint in family.checkpoints:
            table.add_row(checkpoint, name, "the architecture, with tiny random weights; not these weights")
    _out().print(table)
    _out().print(f"\nAny checkpoint of these families loads. Attention with key scores: {implementation()}.")


def _watch(session: Session) -> None:
    expected = session.state.frames_expected
    with _progress() as bar:
        task = bar.add_task("frames", total=expected)
        try:
            session.watch(on_step=lambda step: bar.update(task, completed=step.frames))
        except KeyboardInterrupt:
            _notes.print(f"statekv: interrupted after {session.frames} frames", markup=False)
            raise typer.Exit(130) from None


def _answer(session: Session, question: str, model: str, as_json: bool) -> None:
    before = session.seconds.answer
    if as_json:
        text = session.ask(question)
        typer.echo(json.dumps(_report(session, model, question, text, session.seconds.answer - before)))
        return
    for piece in session.stream(question):
        typer.echo(piece, nl=False)
    typer.echo()


def _report(session: Session, model: str, question: str, text: str, answer_seconds: float) -> dict[str, Any]:
    from statekv.ops import implementation

    state, seconds = session.state, dataclasses.asdict(session.seconds)
    return {
        "question": question,
        "text": text,
        "model": model,
        "method": state.config.method,
        "carry": state.config.carry,
        "recall": state.config.recall,
        "layout": state.config.layout,
        "kernel": implementation(state.config.kernel),
        "budget": state.config.budget,
        "frames": session.frames,
        "tokens": state.tokens,
        "carried": state.carried.length,
        "positions": state.position,
        "horizon": state.horizon,
        "seconds": {**seconds, "answer": answer_seconds},
        "bytes": state.nbytes,
    }


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
    _out().print(table)
    asked = len(results[0].rows)
    _out().print(f"{asked} questions; guessing would get {100 * results[0].chance():.1f} %.")


def _check_source(video: str) -> None:
    from statekv.video.source import check_file, local_path

    path = local_path(video)
    if path is not None:
        check_file(path)


def _out() -> Console:
    # A pipe has no width: 80 columns would cut the tables.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=_notes, transient=True, disable=not _notes.is_terminal)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    _notes.print(f"statekv: warning: {message}", markup=False, soft_wrap=True)
