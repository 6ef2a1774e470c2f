"""`statekv eval …`: benchmarks, their tables, the picture."""

from __future__ import annotations

import csv
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from statekv.cli import options
from statekv.cli.bench import numbers
from statekv.cli.console import columned, complain, doing, load, notes, out, progress, rounded, to_json
from statekv.config import METHODS, SETTINGS, Config
from statekv.config.spelling import check_name, read_method, split_methods
from statekv.errors import ConfigError
from statekv.evals.paper.table import BUDGET, MEANS, TABLE

if TYPE_CHECKING:
    from statekv.engine.engine import Engine
    from statekv.evals.paper.check import DataCheck, WeightsCheck
    from statekv.evals.report import Figures
    from statekv.evals.results import Shard
    from statekv.evals.task import Task

_METHODS = "full,statekv,statekv_weighted,recency_window,random"
_ALL = ",".join(TABLE)


TaskName = Annotated[str, typer.Argument(help="cards, videomme, mlvu, ovo_realtime, ovo_backward.", show_default=False)]
Folder = Annotated[Path | None, typer.Argument(help="Where the data are, or films of cards go.", show_default=False)]
Out = Annotated[Path | None, typer.Option(help="Folder of the results; statekv-eval/TASK/MODEL if left out.")]
Frames = Annotated[int | None, typer.Option(help="Length of the films of cards; 1024 if left out.")]
Videos = Annotated[
    int | None, typer.Option(help="The first so many videos alone; 20 films of cards.", min=1, max=1_000_000)
]
FirstFilm = Annotated[int | None, typer.Option(help="Number of the first film of cards; 0 if left out.")]
Part = Annotated[str | None, typer.Option(help="0/2 is the first half; under accelerate launch its own share.")]


class _Evals(TyperGroup):
    """`statekv eval cards` is short for `statekv eval run cards`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, args if args[0] in self.commands else ["run", *args])


app = typer.Typer(
    name="eval",
    cls=_Evals,
    help="Run a benchmark (statekv eval cards), show its table, draw accuracy against cost.",
    no_args_is_help=True,
)


# What tells methods apart is told with them, and a benchmark's videos are files.
_NOT = ("budget", "carry", "recall", "uniform", "schemes", "max_lag_seconds", "reconnect_seconds")
_PRESCRIBED = options.Default(None, "Instead of what the task prescribes.")


@app.command()
@options.generated(
    [name for name in SETTINGS if name not in _NOT],
    own_defaults=False,
    **dict.fromkeys(("fps", "max_frames", "max_new_tokens"), _PRESCRIBED),
)
def run(
    task: TaskName,
    folder: Folder = None,
    *,
    out: Out = None,
    frames: Frames = None,
    videos: Videos = None,
    first: FirstFilm = None,
    shard: Part = None,
    loading: options.Loading,
    method: options.Methods = None,
    budgets: options.Budgets = str(SETTINGS["budget"].default),
    settings: options.Settings,
) -> None:
    """Answer a benchmark's questions with several methods side by side. Run again, it goes on where it stopped."""
    from statekv.evals.results import Shard

    chosen = _open_task(task, folder, frames, videos, first)
    configs = _configs(method or [_METHODS], numbers("budgets", budgets), chosen.settings, settings)
    part = Shard.launched() if shard is None else Shard.parse(shard)
    model, revision = loading.get("model", "demo"), loading.get("revision")
    place = out or Path("statekv-eval", chosen.name, model.replace("/", "--"))
    if next(iter(chosen.videos()), None) is None:  # data that are not there are told before the model is loaded
        raise ConfigError(f"{chosen.name} has no videos", "check the folder of its data")
    engine = load(**loading | {"device": _device(loading.get("device", "auto"))})
    _evaluate(engine, chosen, configs, place, model=model, revision=revision, shard=part, most=videos)


def _evaluate(engine: Engine, task: Task, configs: Mapping[str, Config], place: Path, **named: Any) -> None:
    """Run it with a bar, tell what failed, and where the results are."""
    from statekv.evals.runner import evaluate

    failed: list[str] = []
    with progress() as bar:
        line = bar.add_task("videos", total=None)

        def show(video: str, failures: Mapping[str, str]) -> None:
            bar.advance(line)
            failed.extend([video] if failures else [])
            _tell(video, failures)

        try:
            evaluate(engine, task, configs, place, on_video=show, **named)
        except KeyboardInterrupt:
            complain(f"interrupted; {place} holds the videos that are done, and the same command goes on from there")
            raise typer.Exit(130) from None
    told = f"; videos that failed: {len(failed)}" if failed else ""
    notes.print(f"results: {place}{told}    table: statekv eval report {place}", markup=False, soft_wrap=True)


def _tell(video: str, failures: Mapping[str, str]) -> None:
    """A line for each reason for which a video failed."""
    for reason in dict.fromkeys(failures.values()):
        names = ", ".join(name for name, why in failures.items() if why == reason)
        complain(f"{video} failed with {names}: {reason}")


def _open_task(name: str, folder: Path | None, frames: int | None, videos: int | None, first: int | None) -> Task:
    from statekv.evals import open_task

    if name == "cards":
        sizes = {"frames": frames, "films": videos, "first": first}
        return open_task(name, folder, **{size: value for size, value in sizes.items() if value is not None})
    if frames is not None:
        raise ConfigError(f"frames is {frames}, but the videos of {name} are as long as they are", "use --max-frames")
    if first is not None:
        raise ConfigError(
            f"first is {first}, but the videos of {name} have no numbers", "use --shard for a part of them"
        )
    return open_task(name, folder)


def _configs(
    methods: list[str], budgets: list[int], prescribed: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Config]:
    """A configuration for each method and budget, the budget in its name where it means something; a ConfigError for a
    setting that means nothing to any of the methods.
    """
    found: dict[str, Config] = {}
    idle = dict(given)
    for written in split_methods(methods):
        method, own = read_method(written)
        # What a task prescribes does not undo what makes a method: uniform takes 64 frames of any video.
        named = Config.of(method, **own)
        plain = named.with_(**named.fitting(**{n: v for n, v in prescribed.items() if n not in METHODS[method]}) | own)
        taken = plain.fitting(**given)
        config, name = plain.with_(**taken | own), written.replace(":", "-")
        budgeted = {f"{name}-{budget}": config.fitting(budget=budget) for budget in budgets}
        if any(budgeted.values()):
            found |= {label: config.with_(**settings) for label, settings in budgeted.items()}
        else:
            found[name] = config
        idle = {name: value for name, value in idle.items() if name not in taken}
    for name, value in idle.items():
        plain.with_(**{name: value})
    return found


def _device(device: str) -> str:
    """The process's own GPU where several were launched together."""
    import torch

    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if rank is not None and device == "auto" and torch.cuda.is_available() else device


Data = Annotated[list[Path], typer.Argument(help="Folders of Video-MME, MLVU, OVO-Bench.", show_default=False)]
Table = Annotated[
    str, typer.Option("--method", help=f"Of {', '.join(TABLE)}, with commas; one at a time takes less memory.")
]
Budget = Annotated[int, typer.Option(help="Tokens that each carries; 4096 is the paper's.")]
FirstVideos = Annotated[int | None, typer.Option(help="The first so many videos of each alone.", min=1)]
Check = Annotated[bool, typer.Option("--check", help="Say what is there and what it will take, and stop.")]
Partly = Annotated[bool, typer.Option("--partly", help="Go on although videos are missing or of no use.")]
PaperOut = Annotated[Path | None, typer.Option("--out", help="Folder of the results; statekv-eval/paper/MODEL.")]


@app.command()
@options.generated([])
def paper(
    data: Data,
    *,
    loading: options.Loading,
    table: Table = _ALL,
    budget: Budget = BUDGET,
    videos: FirstVideos = None,
    out: PaperOut = None,
    partly: Partly = False,
    check: Check = False,
) -> None:
    """Run the paper's table on a folder of weights (--model) and folders of data, once both are found whole.

    Frames, time and memory are told before it starts. Run again, it goes on where it stopped.
    """
    from statekv.evals.paper.check import check_room, check_weights
    from statekv.evals.paper.plan import weights_told
    from statekv.evals.report import load as load_results
    from statekv.evals.results import Shard

    methods = list(dict.fromkeys(name.strip() for name in table.split(",")))
    for name in methods:
        check_name("method", name, TABLE)
    part, weights = Shard.launched(), check_weights(loading.get("model", "demo"))
    _say("weights", weights_told(weights))
    found = [_look(folder, videos, partly) for folder in data]
    if len(runs := {each.task.name: _configs(methods, [budget], each.task.settings, {}) for each in found}) < len(data):
        raise ConfigError("two of the folders hold the same data set", "give each one once")
    place = out or Path("statekv-eval", "paper", Path(weights.name).name)
    check_room(place, sum(len(each.questions) for each in found), len(methods))
    loading |= {"device": _device(loading.get("device", "auto"))}
    engine = _plan(found, runs, place, part, loading, weights)
    if check:
        _say("to go on", f"the same without --check; results go to {place}")
        return
    for each in found if engine is not None else []:
        assert engine is not None
        named = {"model": weights.name, "shard": part, "most": videos}
        _evaluate(engine, each.task, runs[each.task.name], place / each.task.name, **named)
    for shown in _by_place(load_results([place])):
        _show(shown)


def _say(what: str, text: str) -> None:
    out().print(f"{what:<9} {text}", markup=False, soft_wrap=True)


def _look(folder: Path, videos: int | None, partly: bool) -> DataCheck:
    """What lies in a folder of data, told; a ConfigError for one that is not whole, unless that is enough."""
    from statekv.evals.paper.check import check_data
    from statekv.evals.paper.plan import data_told, faults_told

    with progress() as bar:
        line = bar.add_task(f"videos of {folder}", total=None)
        found = check_data(folder, videos, lambda: bar.advance(line))
    _say("data", data_told(found, folder))
    if faults := faults_told(found):
        if not partly:
            raise ConfigError(faults, "get them, or go on without them by --partly")
        complain(faults)
    return found


def _plan(
    found: Sequence[DataCheck],
    runs: Mapping[str, Mapping[str, Config]],
    place: Path,
    part: Shard,
    loading: Mapping[str, Any],
    weights: WeightsCheck,
) -> Engine | None:
    """The loaded model, once what is left and what that will take is told; None where nothing is left.

    Raises:
        MemoryLimitError: weights or caches do not fit.
    """
    from statekv.evals.paper.check import left
    from statekv.evals.paper.estimate import trial
    from statekv.evals.paper.plan import Part, check_memory, check_weights_fit, plan_told

    waiting = [left(each, place, runs[each.task.name], part, weights.name) for each in found]
    if not any(waiting):
        _say("time", "none: all videos are done")
        return None
    check_weights_fit(weights, loading)
    engine = load(**loading)
    with doing("trying a few steps and an answer"):
        tried = [trial(engine, each.longest, runs[each.task.name]) for each in found]
    parts = [Part(*each) for each in zip(found, waiting, tried, strict=True)]
    for what, text in plan_told(parts, part.count):
        _say(what, text)
    check_memory(parts)
    return engine


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
        typer.echo("\n".join(to_json(asdict(run)) for run in found))
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
    from statekv.evals.report import draw, load

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
        f"{headline}, %": [_percent(run.headline) for run in runs],
        "95 %": [_range(run.low, run.high) for run in runs],
        "− full": [_percent(run.difference, sign=True) for run in runs],
        " 95 % ": [_range(run.difference_low, run.difference_high, sign=True) for run in runs],
        "KL": ["" if run.kl is None else f"{run.kl:.3f}" for run in runs],
        "as full, %": [_percent(run.agreement) for run in runs],
        "GFLOP/video": [f"{run.flops / 1e9:,.0f}" for run in runs],
        "paper, %": [_percent(run.paper, digits=2) for run in runs],
        "failed": [str(len(run.failed) or "") for run in runs],
    }
    title = f"{place}: {_asked(runs)}; guessing gets {_percent(runs[0].chance)} %\n{_frames(runs)}"
    others = [name for name in runs[0].headlines if name != headline]
    parts = {"method": columns["method"], "budget": columns["budget"]}
    parts |= {name: [_percent(run.headlines.get(name)) for run in runs] for name in others}
    out().print(columned(title, columns, ("method",)))
    if others:
        out().print(columned("parts, %", parts, ("method",)))
    if any(run.paper is not None for run in runs):
        out().print(f"paper: {MEANS[runs[0].task]}.", markup=False, soft_wrap=True)
    _tell_figures(runs)


def _tell_figures(runs: Sequence[Figures]) -> None:
    """What must be known besides the figures, each thing once."""
    told: dict[str, list[str]] = {}
    for run in runs:
        name = run.method if run.budget is None else f"{run.method} {run.budget}"
        failed = [f"{video} failed: {reason}" for video, reason in run.failed.items()]
        for line in (*failed, *run.notes):
            told.setdefault(line, []).append(name)
    for line, names in told.items():
        whose = "" if len(names) == len(runs) else f" ({', '.join(names)})"
        complain(f"{line}{whose}")


def _asked(runs: Sequence[Figures]) -> str:
    counts = {(run.questions, run.videos) for run in runs}
    questions, videos = max(counts)
    told = f"{questions} questions on {videos} videos"
    return told if len(counts) == 1 else f"{told}, fewer for some methods"


def _frames(runs: Sequence[Figures]) -> str:
    """How densely videos were sampled, where that is the same for all."""
    limits = {(run.fps, run.max_frames) for run in runs}
    if len(limits) > 1:
        return "frames a second and in all differ"
    ((fps, most),) = limits
    rate = "every frame" if fps is None else f"at most {fps:g} frames/s"
    ends = "" if most is None else f" and {most} frames"
    seen = max((run.frames for run in runs if run.frames is not None), default=None)
    return f"{rate}{ends}" + ("" if seen is None else f"; a question had seen {seen:.1f} on average")


def _percent(share: float | None, sign: bool = False, digits: int = 1) -> str:
    if share is None or math.isnan(share):
        return ""
    return f"{100 * share:{'+' if sign else ''}.{digits}f}"


def _range(low: float | None, high: float | None, sign: bool = False) -> str:
    found = [_percent(low, sign), _percent(high, sign)]
    return " … ".join(found) if all(found) else ""


def _write_csv(found: Sequence[Figures]) -> None:
    rows = []
    for run in found:
        row = rounded(asdict(run))
        headlines = row.pop("headlines")
        rows.append({**row, "failed": len(run.failed), "notes": "; ".join(run.notes), **headlines})
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(sys.stdout, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
