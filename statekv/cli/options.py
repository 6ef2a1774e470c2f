"""Options and arguments, each with its help; those of settings are made from their declarations."""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from statekv.config import METHODS, SETTINGS, Config
from statekv.errors import ConfigError, StateKVError

Video = Annotated[str, typer.Argument(help="A video file or URL.", show_default=False)]


def finite(value: float) -> float:
    """What is given, unless it is no number, which no range refuses."""
    if math.isnan(value):
        raise typer.BadParameter("nan is no number.")
    return value


def variable(name: str) -> str:
    """STATEKV_MAX_FRAMES for max_frames."""
    return f"STATEKV_{name.upper()}"


Method = Annotated[
    str | None,
    typer.Option(
        help=f"One of: {', '.join(METHODS)}.", rich_help_panel="Method", envvar=variable("method"), show_envvar=False
    ),
]
Methods = Annotated[
    list[str] | None,
    typer.Option(help=f"With commas: {', '.join(METHODS)}; each with settings of its own as in statekv:decay=0.9."),
]
VideoStream = Annotated[
    int | None, typer.Option(help="Which video stream of the file, from 0.", rich_help_panel="Source")
]
Save = Annotated[
    Path | None, typer.Option(help="Folder that keeps what was seen, for --restore; a session in it is replaced.")
]

Csv = Annotated[
    Path | None,
    typer.Option("--csv", help="Rows are appended here; by default in benchmarks/results or statekv-bench."),
]
Picture = Annotated[Path | None, typer.Option(help="PNG to write; by default beside the rows.")]
RowsAsJson = Annotated[bool, typer.Option("--json", help="One JSON object for each row instead of the table.")]
Runs = Annotated[int, typer.Option(help="Timed runs of each candidate, taken in turns.", min=1, max=100_000)]
Sizes = Annotated[
    str | None, typer.Option("--models", help="Language models in real size, with commas; all if left out.")
]
Budgets = Annotated[str, typer.Option(help="Carried tokens, with commas.")]
BenchDevice = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1 …")]
BenchDtype = Annotated[str, typer.Option("--dtype", help="auto: bfloat16 on CUDA, else float32.")]
Peer = Annotated[Path | None, typer.Option(help="A Python file with flash_attn_with_key_scores; it is run.")]

Settings = dict[str, Any]  # of `Config`, by name
Loading = dict[str, Any]  # arguments of `statekv.load` that say which model, and where

_OF_METHODS = {name for settings in METHODS.values() for name in settings}
_AS_THE_METHOD = "By default as the method has it."
_DEVICE, _DTYPE = "auto, cpu, cuda, cuda:1 …", "auto, float32, bfloat16 or float16."
LOADING: Mapping[str, tuple[Any, Any, str]] = {
    "model": (str, "demo", "A hub id, a folder, or demo."),
    "dtype": (str, "auto", _DTYPE),
    "device": (str, "auto", _DEVICE),
    "device_map": (str | None, None, "Passed on to transformers, for example auto."),
    "revision": (str | None, None, "Branch, tag or commit on the hub."),
    "trust_remote_code": (bool, False, "Run code that comes with the checkpoint."),
}


class Default(NamedTuple):
    """What a setting is with one command where nothing was typed (None: what the command makes of that), and what is to
    be said of it besides its help.
    """

    value: Any
    told: str = ""


def generated(
    names: Iterable[str] = SETTINGS, own_defaults: bool = True, **defaults: Default
) -> Callable[[Callable[..., None]], Any]:
    """Give a command the options that are declared elsewhere.

    It has `settings` if it takes some, and `loading` if it loads a model, among its keyword-only parameters. Each is
    handed what was typed, by name, and nothing else: so a command knows what was asked for. In the errors that it
    raises settings are spelled as the options that they are.

    What the environment and the user's file say (`statekv.cli.defaults`) goes with `loading`, so that it becomes the
    engine's, as far as it means something beside what was typed.

    Args:
        names: of the settings.
        own_defaults: whether the user may have other defaults for settings; a benchmark's are prescribed.
        defaults: those that differ from the settings' own; they are handed on as if they had been typed.
    """
    known = {
        "settings": [_setting(name, defaults.get(name), own_defaults) for name in names],
        "loading": [_loading(name, *declared) for name, declared in LOADING.items()],
    }
    fixed = {name for name, default in defaults.items() if default.value is not None}
    spelling = {option.name: as_option(option.name) for group in known.values() for option in group}

    def decorate(command: Callable[..., None]) -> Any:
        own = inspect.signature(command, eval_str=True).parameters
        groups = {group: options for group, options in known.items() if group in own}

        @functools.wraps(command)
        def run(context: typer.Context, **given: Any) -> None:
            near = _nearness(context, given)
            given |= {"method": None} if "method" in given and "method" not in near else {}
            values = {group: {each.name: given.pop(each.name) for each in options} for group, options in groups.items()}
            try:
                shared = _shared_out(values, given.get("method"), near, fixed)
                given |= {group: shared[group] for group in values}
                command(**given, **({"context": context} if "context" in own else {}))
            except StateKVError as error:
                raise error.spelled(lambda name: spelling.get(name, name)) from error

        parameters = list(_spread(own, known))
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def as_option(name: str) -> str:
    """--max-frames for max_frames."""
    return "--" + name.replace("_", "-")


_NEAREST = ("COMMANDLINE", "ENVIRONMENT", "DEFAULT_MAP")  # the last: the user's file
_OF_THE_MACHINE = ("device", "device_map")


def _nearness(context: typer.Context, given: Mapping[str, Any]) -> dict[str, int]:
    """Who said what an option is: 0 the command line, 1 the environment, 2 the user's file; the others are left out.

    A session that is gone on with is as it was saved: of what else was said only the machine's part counts.
    """
    sources = {name: context.get_parameter_source(name) for name in context.params}
    near = {name: _NEAREST.index(by.name) for name, by in sources.items() if by is not None and by.name in _NEAREST}
    kept = given.get("restore")
    if kept is None or not kept.is_dir() or not any(kept.iterdir()):
        return near
    return {name: rank for name, rank in near.items() if rank == 0 or name in _OF_THE_MACHINE}


def _shared_out(
    values: Mapping[str, Mapping[str, Any]], method: str | None, near: Mapping[str, int], fixed: Container[str]
) -> dict[str, dict[str, Any]]:
    """What a command is handed as its `settings`, and as its `loading` if it has that."""
    given = values.get("settings", {})
    settings = {name: value for name, value in given.items() if near.get(name) == 0 or name in fixed}
    lasting = {name: value for name, value in given.items() if name in near and name not in settings}
    lasting = _fitting(method, near, settings, lasting) if lasting else {}
    if "loading" not in values:
        return {"settings": settings | lasting}
    loading = {name: value for name, value in values["loading"].items() if name in near}
    return {"settings": settings, "loading": loading | lasting}


def _fitting(
    method: str | None, near: Mapping[str, int], settings: Mapping[str, Any], lasting: Mapping[str, Any]
) -> dict[str, Any]:
    """Those defaults of the user's that mean something with the method and beside what was typed."""
    of_method = METHODS.get(method, {}) if method is not None else {}
    left = {
        name: SETTINGS[name].kind.read(name, value)
        for name, value in lasting.items()
        if name not in of_method or near[name] <= near["method"]
    }
    found: dict[str, Any] = {}
    Config.of(method, **settings)
    while more := [name for name, value in left.items() if _goes(method, {**settings, **found, name: value})]:
        found[more[0]] = left.pop(more[0])
    return found


def _goes(method: str | None, settings: Mapping[str, Any]) -> bool:
    try:
        Config.of(method, **settings)
    except ConfigError:
        return False
    return True


def _spread(
    own: Mapping[str, inspect.Parameter], known: Mapping[str, list[inspect.Parameter]]
) -> Iterator[inspect.Parameter]:
    """A command's parameters, each group as its options."""
    if "context" not in own:
        yield inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    for name, parameter in own.items():
        yield from known.get(name, [parameter])


def _setting(name: str, changed: Default | None, own_default: bool) -> inspect.Parameter:
    setting = SETTINGS[name]
    default, told = changed or Default(setting.default, _AS_THE_METHOD if name in _OF_METHODS else "")
    kind = setting.kind.option
    switch = [f"{setting.option}/--no-{setting.option[2:]}"] if kind is bool else []
    text = f"{setting.description} {told}".rstrip()
    shown = told is not _AS_THE_METHOD
    more: dict[str, Any] = {"envvar": variable(name), "show_envvar": False} if own_default else {}
    option = typer.Option(*switch, help=text, rich_help_panel=setting.panel, show_default=shown, **more)
    return _option(name, kind | None if default is None or setting.optional else kind, default, option)


def _loading(name: str, kind: Any, default: Any, told: str) -> inspect.Parameter:
    switch = ["--trust-remote-code"] if kind is bool else []
    more: dict[str, Any] = {"envvar": variable(name), "show_envvar": False} if name != "trust_remote_code" else {}
    return _option(name, kind, default, typer.Option(*switch, help=told, rich_help_panel="Model", **more))


def _option(name: str, kind: Any, default: Any, option: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


_SECONDS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600}


def seconds_of(text: str, name: str) -> float:
    """Return the seconds of "30s", "2m", "1.5h" or "30"; a ConfigError for anything else, and for 0."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(s|m|min|h|)", text.strip())
    if match is None or not float(match[1]):
        raise ConfigError(f"{name} is {text!r}, but must be a length of time", "write 30s, 2m or 1h")
    return float(match[1]) * _SECONDS[match[2]]


def clock(seconds: float) -> str:
    """0:00:07 for 7.4 seconds."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
