"""`statekv watch`: a stream and its questions, in a terminal."""

from __future__ import annotations

import sys
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

import statekv
from statekv.cli import options
from statekv.cli.console import notes
from statekv.cli.durations import seconds_of
from statekv.cli.keeping import Keeper
from statekv.cli.keyboard import Line, Questions, find_terminal, piped, typed_keys
from statekv.cli.restoring import LOADING, load_again, typed_options
from statekv.cli.watch_views import Facts, Plain, Screen
from statekv.cli.watching import Standing, Watching
from statekv.config import CAPS, Config
from statekv.engine.interrupts import endings_interrupt
from statekv.errors import ConfigError

if TYPE_CHECKING:
    from statekv.engine.engine import Engine
    from statekv.engine.session import Session

_DEFAULT = Config()
_SETTINGS = (
    *("budget", "fps", "max_frames", "max_new_tokens", "carry", "recall", "pin_prefix", "retrieve", "layout"),
    *("horizon", "on_horizon", "kernel", "max_lag_seconds", "reconnect_seconds", "schemes"),
    *(*CAPS, "disk_folder", "bits"),
)

LiveSource = Annotated[
    str, typer.Argument(help="A file, a URL, a camera (/dev/video0), or - for a pipe.", show_default=False)
]
Realtime = Annotated[bool, typer.Option("--realtime", help="Show a file as if it were live.")]
AskEvery = Annotated[
    tuple[str, str] | None,
    typer.Option(help="A time of the stream and a question that is asked so often: 30s 'what happens?'"),
]
Log = Annotated[Path | None, typer.Option(help="Append each answer to this file, one JSON object per line.")]
MaxLag = Annotated[float, typer.Option(help="Seconds that a live frame waits before newer ones push it out.")]
Reconnect = Annotated[float, typer.Option(help="Seconds that a source that went away is waited for; 0: not at all.")]
Autosave = Annotated[str | None, typer.Option(help="How often the stream is saved to the folder of --save: 60s, 5m.")]
Restore = Annotated[
    Path | None,
    typer.Option(
        help="Go on with what --save kept. Where both name one folder, nothing need be in it at the first start."
    ),
]
Schemes = Annotated[str, typer.Option(help="Protocols that may be opened, with commas.")]


def watch(
    context: typer.Context,
    source: LiveSource,
    model: options.Model = "demo",
    realtime: Realtime = False,
    ask_every: AskEvery = None,
    log: Log = None,
    save: options.Save = None,
    autosave: Autosave = None,
    restore: Restore = None,
    method: options.Method = None,
    budget: options.Budget = _DEFAULT.budget,
    fps: options.Fps = 1.0,
    max_frames: options.MaxFrames = None,
    max_new_tokens: options.MaxNewTokens = _DEFAULT.max_new_tokens,
    carry: options.Carry = None,
    recall: options.Recall = None,
    pin_prefix: options.PinPrefix = None,
    retrieve: options.Retrieve = _DEFAULT.retrieve,
    layout: options.LayoutName = _DEFAULT.layout,
    horizon: options.Horizon = None,
    on_horizon: options.OnHorizon = None,
    memory: options.Memory = None,
    host_memory: options.HostMemory = None,
    disk: options.Disk = None,
    disk_folder: options.DiskFolder = None,
    bits: options.Bits = None,
    kernel: options.Kernel = _DEFAULT.kernel,
    max_lag_seconds: MaxLag = _DEFAULT.max_lag_seconds,
    reconnect_seconds: Reconnect = _DEFAULT.reconnect_seconds,
    schemes: Schemes = _DEFAULT.schemes,
    stream: options.VideoStream = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Watch SOURCE as it comes and answer questions meanwhile; quit or Ctrl-C ends it."""
    given, typed = dict(locals()), typed_options(context)
    settings = {name: given[name] for name in _SETTINGS if given[name] is not None}
    standing = Standing(seconds_of(ask_every[0], "--ask-every"), ask_every[1]) if ask_every else None
    every_seconds = _check_saving(save, autosave)
    name = _check_source(source, Config.of(method, **settings))
    restored = _restored(save, restore)
    with ExitStack() as stack:
        stack.enter_context(endings_interrupt())
        answers = stack.enter_context(closing(_open_log(log))) if log is not None else None
        engine = _load(given, settings) if restored is None else load_again(restored, given, typed)[1]
        if standing is not None:
            engine.check_question(standing.question)
        session = stack.enter_context(_open(engine, given, typed, restored))
        facts, questions = Facts(session, name), Questions()
        view = _view(stack, facts, questions, source == "-")
        keeper = Keeper(session, save, every_seconds, view.say, restored is not None and restored == save)
        watching = Watching(session, facts, questions, view, standing, answers, keeper)
        code = watching.run()
        summary = watching.summary()
    notes.print(f"statekv: {summary}", markup=False, soft_wrap=True)
    raise typer.Exit(code)


def _view(stack: ExitStack, facts: Facts, questions: Questions, stdin_is_video: bool) -> Screen | Plain:
    """Where questions come from and answers go to, for as long as the stack lasts."""
    terminal = find_terminal(stdin_is_video)
    if terminal is not None:
        line = Line()
        stack.enter_context(typed_keys(terminal, line, questions))
        return stack.enter_context(Screen(facts, line))
    if stdin_is_video:
        questions.closed = True
    else:
        piped(questions, sys.stdin)
    return stack.enter_context(Plain(facts))


def _load(given: dict[str, Any], settings: dict[str, Any]) -> Engine:
    return statekv.load(given["model"], given["method"], **{name: given[name] for name in LOADING}, **settings)


def _open(engine: Engine, given: dict[str, Any], typed: set[str], restored: Path | None) -> Session:
    if restored is None:
        return engine.open(given["source"], stream=given["stream"], realtime=given["realtime"])
    session = engine.restore(restored, given["source"], **{name: given[name] for name in typed & set(_SETTINGS)})
    if given["realtime"] and session.live is None:
        rule = "--realtime was given with --restore, but a session stays as it was opened"
        raise ConfigError(rule, "leave --realtime out, or watch the video again")
    return session


def _restored(save: Path | None, restore: Path | None) -> Path | None:
    """The folder to go on from; None where it is the one to save to, and nothing has been saved yet."""
    from statekv.cache.folder import FACTS

    return None if restore is None or (restore == save and not (restore / FACTS).exists()) else restore


def _check_saving(save: Path | None, autosave: str | None) -> float | None:
    from statekv.cache.folder import check_target

    if save is not None:
        check_target(save)
    if autosave is None:
        return None
    if save is None:
        raise ConfigError(f"--autosave is {autosave!r}, but nothing says where to save", "add --save FOLDER")
    return seconds_of(autosave, "--autosave")


def _open_log(path: Path) -> TextIO:
    try:
        return path.open("a", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {(error.strerror or '').lower()}", "name another file") from None


def _check_source(source: str, config: Config) -> str:
    """Complain before the model is loaded, which takes its time; returns the source's name."""
    from statekv.video.address import check_scheme, locate
    from statekv.video.source import check_there, display_name

    check_scheme(source, tuple(config.schemes.split(",")))
    check_there(source)
    locate(source)
    return display_name(source)
