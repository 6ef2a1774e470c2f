"""`statekv eval …`: benchmarks, their tables, the picture."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

import statekv
from statekv.cli import options
from statekv.cli.bench import numbers
from statekv.cli.console import notes, progress
from statekv.config import METHODS, Config, check_name
from statekv.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from statekv.evals.task import Task

_DEFAULT = Config()
_METHODS = "full,statekv,recency_window,random"


TaskName = Annotated[str, typer.Argument(help="cards, videomme, mlvu, ovo_realtime, ovo_backward.", show_default=False)]
Folder = Annotated[Path | None, typer.Argument(help="Where the data are, or films of cards go.", show_default=False)]
Methods = Annotated[
    list[str] | None,
    typer.Option(help=f"With commas: {', '.join(METHODS)}; each with settings of its own as in statekv:decay=0.9."),
]
Out = Annotated[Path | None, typer.Option(help="Folder of the results; statekv-eval/TASK/MODEL if left out.")]
Frames = Annotated[int | None, typer.Option(help="Length of the films of cards; 1024 if left out.")]
Videos = Annotated[int | None, typer.Option(help="The first so many videos alone; 20 films of cards.", min=1)]
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


@app.command()
def run(
    task: TaskName,
    folder: Folder = None,
    model: options.Model = "demo",
    method: Methods = None,
    budgets: options.Budgets = str(_DEFAULT.budget),
    out: Out = None,
    frames: Frames = None,
    videos: Videos = None,
    shard: Part = None,
    max_frames: Annotated[int | None, typer.Option(help="Instead of what the task prescribes.", min=1)] = None,
    layout: options.LayoutName = _DEFAULT.layout,
    horizon: options.Horizon = None,
    on_horizon: options.OnHorizon = None,
    retrieve: options.Retrieve = _DEFAULT.retrieve,
    last_frames: options.LastFrames = _DEFAULT.last_frames,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Answer a benchmark's questions with several methods side by side. Run again, it goes on where it stopped."""
    from statekv.evals.runner import evaluate
    from statekv.evals.shard import Shard

    given = {"layout": layout, "horizon": horizon, "retrieve": retrieve, "last_frames": last_frames}
    given |= {"on_horizon": on_horizon}
    if max_frames is not None:
        given["max_frames"] = max_frames
    chosen = _open_task(task, folder, frames, videos)
    configs = _configs(method or [_METHODS], numbers("budgets", budgets), chosen.settings, given)
    part = Shard.launched() if shard is None else Shard.parse(shard)
    place = out or Path("statekv-eval", chosen.name, model.replace("/", "--"))
    loading: dict[str, Any] = {
        "dtype": dtype,
        "device_map": device_map,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
    }
    if next(iter(chosen.videos()), None) is None:  # data that are not there are told before the model is loaded
        raise ConfigError(f"{chosen.name} has no videos", "check the folder of its data")
    engine = statekv.load(model, device=_device(device), **loading)
    failed: list[str] = []
    with progress() as bar:
        line = bar.add_task("videos", total=None)

        def show(video: str, failures: Mapping[str, str]) -> None:
            bar.advance(line)
            failed.extend([video] if failures else [])
            _tell(video, failures)

        evaluate(engine, chosen, configs, place, model=model, revision=revision, shard=part, most=videos, on_video=show)
    told = f"; videos that failed: {len(failed)}" if failed else ""
    notes.print(f"results: {place}{told}    table: statekv eval report {place}", markup=False, soft_wrap=True)


def _tell(video: str, failures: Mapping[str, str]) -> None:
    """A line for each reason for which a video failed."""
    for reason in dict.fromkeys(failures.values()):
        names = ", ".join(name for name, why in failures.items() if why == reason)
        notes.print(f"statekv: {video} failed with {names}: {reason}", markup=False, soft_wrap=True)


def _open_task(name: str, folder: Path | None, frames: int | None, videos: int | None) -> Task:
    from statekv.evals import open_task

    if name == "cards":
        sizes = {"frames": frames, "films": videos}
        return open_task(name, folder, **{size: value for size, value in sizes.items() if value is not None})
    if frames is not None:
        raise ConfigError(f"frames is {frames}, but the videos of {name} are as long as they are", "use --max-frames")
    return open_task(name, folder)


def _configs(
    methods: list[str], budgets: list[int], prescribed: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Config]:
    """A configuration for each method and budget, the budget in its name where it means something."""
    found = {}
    for written in dict.fromkeys(written.strip() for part in methods for written in part.split(",")):
        method, own = _read_method(written)
        # What a task prescribes does not undo what makes a method: uniform takes 64 frames of any video.
        settings = {name: value for name, value in prescribed.items() if name not in METHODS[method]}
        settings |= {**given, **own}
        name = written.replace(":", "-")
        if Config.of(method, **settings).carry == "all":
            found[name] = Config.of(method, **settings)
        else:
            found |= {f"{name}-{budget}": Config.of(method, **settings, budget=budget) for budget in budgets}
    return found


def _read_method(written: str) -> tuple[str, dict[str, Any]]:
    """`statekv:decay=0.9` → the method and settings of its own."""
    method, *own = written.split(":")
    check_name("method", method, tuple(METHODS))
    settings = {}
    for text in own:
        name, _, value = text.partition("=")
        if not value or name == "budget":
            raise ConfigError(
                f"{text!r} in {written} is no setting", "write statekv:decay=0.9, and budgets as --budgets"
            )
        try:
            settings[name] = json.loads(value.lower())  # numbers, true, false, null
        except ValueError:
            settings[name] = value
    return method, settings


def _device(device: str) -> str:
    """The process's own GPU where several were launched together."""
    import torch

    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if rank is not None and device == "auto" and torch.cuda.is_available() else device
