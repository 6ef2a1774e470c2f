"""Options and arguments, each with its help; those of settings are made from their declarations."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from statekv.config import METHODS, SETTINGS
from statekv.errors import ConfigError, StateKVError

Video = Annotated[str, typer.Argument(help="A video file or URL.", show_default=False)]
Method = Annotated[str | None, typer.Option(help=f"One of: {', '.join(METHODS)}.", rich_help_panel="Method")]
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
Runs = Annotated[int, typer.Option(help="Timed runs of each candidate, taken in turns.", min=1)]
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
_LOADING: Mapping[str, tuple[Any, Any, str]] = {
    "model": (str, "demo", "A hub id, a folder, or demo."),
    "dtype": (str, "auto", _DTYPE),
    "device": (str, "auto", _DEVICE),
    "device_map": (str | None, None, "Passed on to transformers, for example auto."),
    "revision": (str | None, None, "Branch, tag or commit on the hub."),
    "trust_remote_code": (bool, False, "Run code that comes with the checkpoint."),
}


class Default(NamedTuple):
    """What a setting is with one command where nothing was typed; None: what the command makes of that.

    Attributes:
        value: of the setting.
        told: what is to be said of it besides the setting's help.
    """

    value: Any
    told: str = ""


def generated(names: Iterable[str] = SETTINGS, **defaults: Default) -> Callable[[Callable[..., None]], Any]:
    """Give a command the options that are declared elsewhere.

    It has `settings`, and `loading` if it loads a model, among its keyword-only parameters. Each is handed what was
    typed, by name, and nothing else: so a command knows what was asked for. In the errors that it raises settings are
    spelled as the options that they are.

    Args:
        names: of the settings.
        defaults: those that differ from the settings' own; they are handed on as if they had been typed.
    """
    known = {
        "settings": [_setting(name, defaults.get(name)) for name in names],
        "loading": [_loading(name, *declared) for name, declared in _LOADING.items()],
    }
    spelling = {option.name: as_option(option.name) for group in known.values() for option in group}

    def decorate(command: Callable[..., None]) -> Any:
        own = inspect.signature(command, eval_str=True).parameters

        @functools.wraps(command)
        def run(context: typer.Context, **given: Any) -> None:
            there = typed(context) | {name for name, default in defaults.items() if default.value is not None}
            for group in known.keys() & own.keys():
                values = {option.name: given.pop(option.name) for option in known[group]}
                given[group] = {name: value for name, value in values.items() if name in there}
            try:
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


def typed(context: typer.Context) -> set[str]:
    """Names of the options on the command line, all others having their defaults."""
    sources = ((name, context.get_parameter_source(name)) for name in context.params)
    return {name for name, source in sources if source is not None and source.name == "COMMANDLINE"}


def _spread(
    own: Mapping[str, inspect.Parameter], known: Mapping[str, list[inspect.Parameter]]
) -> Iterator[inspect.Parameter]:
    """A command's parameters, each group as its options."""
    if "context" not in own:
        yield inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    for name, parameter in own.items():
        yield from known.get(name, [parameter])


def _setting(name: str, changed: Default | None) -> inspect.Parameter:
    setting = SETTINGS[name]
    default, told = changed or Default(setting.default, _AS_THE_METHOD if name in _OF_METHODS else "")
    kind = setting.kind.option
    switch = [f"{setting.option}/--no-{setting.option[2:]}"] if kind is bool else []
    text = f"{setting.description} {told}".rstrip()
    option = typer.Option(*switch, help=text, rich_help_panel=setting.panel, show_default=told is not _AS_THE_METHOD)
    return _option(name, kind | None if default is None or setting.optional else kind, default, option)


def _loading(name: str, kind: Any, default: Any, told: str) -> inspect.Parameter:
    switch = ["--trust-remote-code"] if kind is bool else []
    return _option(name, kind, default, typer.Option(*switch, help=told, rich_help_panel="Model"))


def _option(name: str, kind: Any, default: Any, option: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


_SECONDS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600}


def seconds_of(text: str, name: str) -> float:
    """Return the seconds of "30s", "2m", "1.5h" or "30".

    Raises:
        ConfigError: anything else, or nothing at all.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(s|m|min|h|)", text.strip())
    if match is None or not float(match[1]):
        raise ConfigError(f"{name} is {text!r}, but must be a length of time", "write 30s, 2m or 1h")
    return float(match[1]) * _SECONDS[match[2]]


def clock(seconds: float) -> str:
    """0:00:07 for 7.4 seconds."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
