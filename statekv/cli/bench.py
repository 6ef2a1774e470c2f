"""`statekv bench …`: questions to the clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from statekv.cli import options
from statekv.cli.console import Report, complain, doing, load, progress
from statekv.config import Config
from statekv.errors import ConfigError, MemoryLimitError

if TYPE_CHECKING:
    from statekv.bench.harness import Bars, Panel, Row
    from statekv.bench.pretrained import Plan
    from statekv.models.families.text import TextModel

    Measured = tuple[list[Row], Sequence[Bars | Panel]]
    Loaded = tuple[TextModel, Callable[[str], list[int]], str]  # a model, what makes tokens for it, its name

app = typer.Typer(
    name="bench",
    help="Measure what a step, an answer, a video cost, and how far that is from the machine's floor.",
    no_args_is_help=True,
)
_MOST_TOKENS = 1 << 20
_BUDGETS = "256,1024,4096,16384"


@app.command()
def attention(
    models: options.Sizes = None,
    budgets: options.Budgets = _BUDGETS,
    queries: Annotated[int, typer.Option(help="Own tokens of a step.", min=1, max=_MOST_TOKENS)] = 256,
    runs: options.Runs = 20,
    peer: options.Peer = None,
    device: options.BenchDevice = "auto",
    dtype: options.BenchDtype = "auto",
    csv: options.Csv = None,
    picture: options.Picture = None,
    as_json: options.RowsAsJson = False,
) -> None:
    """Time attention with key scores in every way, beside stock attention without scores."""
    from statekv.bench.attention import load_peer, measure, panels, shapes
    from statekv.bench.harness import matmul_rate, place

    where, kind = place(device, dtype)
    found = shapes(names(models), numbers("budgets", budgets), queries)
    stranger = None if peer is None else load_peer(peer)
    report, rows = Report("attention", csv, picture, as_json), []
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
    as_json: options.RowsAsJson = False,
) -> None:
    """Compute a video's prefill FLOPs by method and length, and check the formula against torch's count."""
    import torch

    from statekv.bench.floor import check, measure, panel

    chosen, carried, lengths = names(models), numbers("budgets", budgets), numbers("frames", frames)
    report, rows = Report("flops", csv, picture, as_json), []
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
    as_json: options.RowsAsJson = False,
) -> None:
    """Weigh both caches against the formula, count what growing copies, and find a step's peak."""
    from statekv.bench.harness import place
    from statekv.bench.memory import carried_row, detailed_rows, panels, peak_rows

    where, kind = place(device, dtype)
    chosen, carried, counts = names(models), numbers("budgets", budgets), numbers("steps", steps)
    report, rows = Report("memory", csv, picture, as_json), []
    with progress() as bar:
        for name in bar.track(chosen, description="models"):
            rows += peak_rows(name, where, kind, carried)
            rows += [carried_row(name, kind, budget) for budget in carried]
            rows += detailed_rows(name, kind, counts)
    report.publish("memory of the language model", rows, panels(rows), where)


def names(models: str | None) -> list[str]:
    """`a,b` → the sizes' names; None: all of them; a ConfigError for an unknown one."""
    from statekv.bench.models import SIZES, size_of

    chosen = SIZES if models is None else dict.fromkeys(name.strip() for name in models.split(","))
    return [size_of(name).name for name in chosen]


def numbers(option: str, text: str) -> list[int]:
    """`1,64` → [1, 64], ascending; a ConfigError for something else than whole numbers of 1 to 7 digits."""
    found = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 8 and int(part) for part in found):
        raise ConfigError(f"{option} is {text!r}, but must be numbers from 1 to 9999999", "write them as in 256,1024")
    return sorted({int(part) for part in found})


def percents(text: str) -> tuple[float, ...]:
    """`2.5,10` → (2.5, 10.0), ascending; a ConfigError for something else than numbers above 0, up to 100."""
    try:
        found = sorted({float(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or not all(0 < share <= 100 for share in found):
        raise ConfigError(f"shares is {text!r}, but must be percents above 0, up to 100", "write them as in 2.5,10")
    return tuple(found)


StepTokens = Annotated[int, typer.Option(help="Tokens of a step.", min=1, max=_MOST_TOKENS)]
Layers = Annotated[int | None, typer.Option(help="Measure the first so many layers; rows say so.")]


def prefill(
    models: options.Sizes = None,
    budgets: options.Budgets = _BUDGETS,
    steps: Annotated[str, typer.Option(help="Step numbers, with commas.")] = "1,4,16,64,256,1024,3600",
    tokens: StepTokens = 256,
    layers: Layers = None,
    method: options.Methods = None,
    plain: Annotated[bool, typer.Option("--plain", help="Also step without CUDA graphs.")] = False,
    runs: options.Runs = 20,
    seconds: Annotated[
        float,
        typer.Option(help="Most seconds for one method at one step; less runs then.", min=0, callback=options.finite),
    ] = 60.0,
    device: options.BenchDevice = "auto",
    dtype: options.BenchDtype = "auto",
    csv: options.Csv = None,
    picture: options.Picture = None,
    as_json: options.RowsAsJson = False,
) -> None:
    """Time a step against its number, for full, and for statekv or other methods at each budget; far steps start from
    filled caches.
    """
    from statekv.bench.harness import place, read_methods
    from statekv.bench.models import size_of
    from statekv.bench.prefill import Plan, measure, panels

    where, kind = place(device, dtype)
    sizes = [size_of(name, layers) for name in names(models)]
    carried, wanted = tuple(numbers("budgets", budgets)), tuple(numbers("steps", steps))
    others = read_methods(method or ["statekv"])
    plans = {size.name: Plan(size, wanted, carried, tokens, runs, seconds, plain, others) for size in sizes}
    report = Report("prefill", csv, picture, as_json)
    rows = _each(plans, lambda name: measure(plans[name], device=where, dtype=kind))
    report.publish("prefill", rows, panels(rows), where)


def answer(
    models: options.Sizes = None,
    steps: Annotated[str, typer.Option(help="Lengths of the stream in steps, with commas.")] = "1,4,16,64,256,1024",
    tokens: StepTokens = 256,
    question: Annotated[int, typer.Option(help="Tokens of the question.", min=1, max=_MOST_TOKENS)] = 32,
    answer: Annotated[int, typer.Option(help="Tokens of the answer.", min=2, max=_MOST_TOKENS)] = 16,
    layers: Layers = None,
    runs: options.Runs = 20,
    device: options.BenchDevice = "auto",
    dtype: options.BenchDtype = "auto",
    csv: options.Csv = None,
    picture: options.Picture = None,
    as_json: options.RowsAsJson = False,
) -> None:
    """Time an answer's first token and each further one, against the length of the stream."""
    from statekv.bench.answer import Plan, measure, panels
    from statekv.bench.floor import Machine
    from statekv.bench.harness import place
    from statekv.bench.models import size_of

    where, kind = place(device, dtype)
    sizes = [size_of(name, layers) for name in names(models)]
    lengths = tuple(numbers("steps", steps))
    plans = {size.name: Plan(size, lengths, tokens, question, answer, runs) for size in sizes}
    report = Report("answer", csv, picture, as_json)
    machine = Machine.measured(where, kind)
    rows = _each(plans, lambda name: measure(plans[name], device=where, dtype=kind, machine=machine))
    rates = f"products at {machine.flops / 1e9:.0f} GFLOP/s, memory at {machine.read / 1e9:.1f} GB/s"
    report.publish(f"answer, {rates}", rows, panels(rows), where)


@options.generated(("budget",), budget=options.Default(1024))
def sessions(
    *,
    models: Annotated[str, typer.Option(help="Language models in real size, or demo, with commas.")] = "demo",
    count: Annotated[str, typer.Option("--sessions", help="How many sessions, with commas.")] = "1,2,4,8",
    settings: options.Settings,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens of a step; by default the model's own.", min=1, max=_MOST_TOKENS)
    ] = None,
    layers: Layers = None,
    runs: options.Runs = 20,
    seconds: Annotated[
        float,
        typer.Option(help="Most seconds for one way with one number; less runs then.", min=0, callback=options.finite),
    ] = 600.0,
    device: options.BenchDevice = "auto",
    dtype: options.BenchDtype = "auto",
    csv: options.Csv = None,
    picture: options.Picture = None,
    as_json: options.RowsAsJson = False,
) -> None:
    """Step several sessions as one batch and in turn, all of them with full carried caches."""
    from statekv.bench.harness import place
    from statekv.bench.sessions import DEMO, Plan, measure, panels

    where, kind = place(device, dtype)
    chosen = [name if name == DEMO else names(name)[0] for name in dict.fromkeys(models.replace(" ", "").split(","))]
    numbered = tuple(numbers("sessions", count))
    plans = {name: Plan(name, numbered, settings["budget"], tokens, layers, runs, seconds) for name in chosen}
    report = Report("sessions", csv, picture, as_json)
    rows = _each(plans, lambda name: measure(plans[name], device=where, dtype=kind))
    report.publish("sessions, ms per step of one session", rows, panels(rows), where)


@options.generated(("budget", "fps", "max_frames"))
def video(
    file: Annotated[Path, typer.Argument(help="A video file.", show_default=False)],
    *,
    runs: options.Runs = 5,
    csv: options.Csv = None,
    picture: options.Picture = None,
    as_json: options.RowsAsJson = False,
    loading: options.Loading,
    method: options.Method = None,
    settings: options.Settings,
) -> None:
    """Watch FILE with decoding in line and overlapped, and show where the time goes."""
    from statekv.video.address import check_file

    Config.of(method, **settings)
    check_file(file)
    from statekv.bench.video import measure

    report = Report("video", csv, picture, as_json)
    engine = load(**loading, method=method, **settings)
    rows, panels = measure(engine, file, runs)
    report.publish(f"video, {loading.get('model', 'demo')}", rows, panels, engine.model.model.device)


def pretrained(
    model: Annotated[
        Path | None,
        typer.Argument(help="A folder with a causal language model, or a GGUF file; SmolLM2-135M if left out."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="What is read; Python's own language reference if left out.")
    ] = None,
    tasks: Annotated[
        str, typer.Option("--task", help="With commas: text, or questions about stories: needle, order, count.")
    ] = "text",
    windows: Annotated[int, typer.Option(help="Windows of the text, or stories.", min=2, max=1_000_000)] = 20,
    tokens: Annotated[int, typer.Option(help="Tokens read in each.", min=64, max=_MOST_TOKENS)] = 1024,
    step: Annotated[int, typer.Option(help="Tokens of a step.", min=1, max=_MOST_TOKENS)] = 64,
    shares: Annotated[str, typer.Option(help="Percent of the tokens that are carried, with commas.")] = "10",
    method: options.Methods = None,
    choosing: Annotated[
        bool, typer.Option("--choosing", help="Read other windows, or stories, to choose settings on.")
    ] = False,
    device: options.BenchDevice = "auto",
    dtype: options.BenchDtype = "auto",
    csv: options.Csv = None,
    picture: options.Picture = None,
    as_json: options.RowsAsJson = False,
) -> None:
    """Read text, or stories, with real weights by several methods, and compare what follows with full attention's."""
    from statekv.bench.harness import place, read_methods
    from statekv.bench.pretrained import METHODS, Plan, read_text
    from statekv.bench.words.tasks import TEXT, read_tasks
    from statekv.models.families.text import load_text

    where, kind = place(device, dtype)
    plan = Plan(tokens=tokens, step=step, shares=percents(shares), methods=read_methods(method or [METHODS]))
    chosen = read_tasks(tasks)
    if text is not None and TEXT not in chosen:
        raise ConfigError(
            f"text is {text}, but none of the tasks {tasks} reads it", "leave it out, or add the task text"
        )
    report, words = Report("pretrained", csv, picture, as_json), read_text(text)
    with doing("loading the model"):
        found = load_text(model, where, kind)
    rows, panels = _texts(found, words, plan, windows, choosing) if TEXT in chosen else ([], [])
    if kinds := [name for name in chosen if name != TEXT]:
        more, drawn = _stories(found, kinds, plan, windows, choosing)
        rows, panels = rows + more, [*panels, *drawn]
    report.publish("pretrained", rows, panels, where)


def _texts(loaded: Loaded, words: str, plan: Plan, windows: int, choosing: bool) -> Measured:
    from statekv.bench.pretrained import measure, panels, windows_of

    model, encode, name = loaded
    cut = windows_of(words, encode, windows, plan.tokens + plan.asked, choosing)
    with progress() as bar:
        task = bar.add_task("windows", total=len(cut))
        rows = measure(model, cut, plan, name, lambda: bar.advance(task))
    return rows, panels(rows)


def _stories(loaded: Loaded, kinds: list[str], plan: Plan, count: int, choosing: bool) -> Measured:
    from statekv.bench.words.stories import tell
    from statekv.bench.words.tasks import measure, panels, rows

    model, encode, name = loaded
    stories = [tell(seed, plan.tokens, plan.step, encode) for seed in range(choosing, 2 * count, 2)]
    with progress() as bar:
        task = bar.add_task("stories", total=count)
        asked = measure(model, stories, plan, kinds, encode, lambda: bar.advance(task))
    return rows(asked, plan, name), panels(asked)


def _each(models: Iterable[str], measure: Callable[[str], list[Row]]) -> list[Row]:
    """The rows of all models; one that does not fit in memory is named and left out, and a MemoryLimitError if none
    does.
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
        complain(f"left out: {reason}")
    return rows
