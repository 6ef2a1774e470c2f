"""`statekv watch`: a stream and its questions, in a terminal."""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack, closing
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

import statekv
from statekv.cli import options
from statekv.cli.console import notes
from statekv.cli.durations import clock, seconds_of
from statekv.cli.keyboard import Line, Questions, find_terminal, piped, typed
from statekv.cli.watch_views import Facts, Plain, Screen
from statekv.config import Config
from statekv.errors import ConfigError, StateKVError

if TYPE_CHECKING:
    from statekv.progress import Progress
    from statekv.session import Session

_DEFAULT = Config()
_SETTINGS = (
    *("budget", "fps", "max_frames", "max_new_tokens", "carry", "recall", "pin_prefix", "retrieve", "layout"),
    *("horizon", "kernel", "max_lag_seconds", "reconnect_seconds", "schemes"),
)
_LOADING = ("dtype", "device", "device_map", "revision", "trust_remote_code")
_WAIT_SECONDS = 0.1

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
Schemes = Annotated[str, typer.Option(help="Protocols that may be opened, with commas.")]


def watch(
    source: LiveSource,
    model: options.Model = "demo",
    realtime: Realtime = False,
    ask_every: AskEvery = None,
    log: Log = None,
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
    given = dict(locals())
    settings = {name: given[name] for name in _SETTINGS if given[name] is not None}
    standing = Standing(seconds_of(ask_every[0], "--ask-every"), ask_every[1]) if ask_every else None
    name = _check_source(source, Config.of(method, **settings))
    with ExitStack() as stack:
        answers = stack.enter_context(closing(_open_log(log))) if log is not None else None
        engine = statekv.load(model, method, **{name: given[name] for name in _LOADING}, **settings)
        if standing is not None:
            engine.check_question(standing.question)
        session = stack.enter_context(engine.open(source, stream=stream, realtime=realtime))
        facts, questions, line = Facts(session, name), Questions(), Line()
        terminal = find_terminal(source == "-")
        view: Screen | Plain = Plain(facts)
        if terminal is not None:
            stack.enter_context(typed(terminal, line, questions))
            view = Screen(facts, line)
        elif source == "-":
            questions.closed = True
        else:
            piped(questions, sys.stdin)
        stack.enter_context(view)
        watching = Watching(session, facts, questions, view, standing, answers)
        code = watching.run()
        summary = watching.summary()
    notes.print(f"statekv: {summary}", markup=False, soft_wrap=True)
    raise typer.Exit(code)


class Standing:
    """A question that is asked again and again, by the stream's time."""

    def __init__(self, every_seconds: float, question: str) -> None:
        self.question = question
        self._every_seconds = every_seconds
        self._due_seconds: float | None = None

    def due(self, pts_seconds: float) -> bool:
        """Say whether it is time; true once for all the times that were missed."""
        if self._due_seconds is None:
            self._due_seconds = pts_seconds + self._every_seconds
        if pts_seconds < self._due_seconds:
            return False
        missed = (pts_seconds - self._due_seconds) // self._every_seconds
        self._due_seconds += (missed + 1) * self._every_seconds
        return True


class Watching:
    """A stream that goes on between its questions.

    Args:
        session: the stream.
        facts: what is shown of it.
        questions: where they come in.
        view: where answers go.
        standing: a question that comes back.
        log: where answers are written down.
    """

    def __init__(
        self,
        session: Session,
        facts: Facts,
        questions: Questions,
        view: Screen | Plain,
        standing: Standing | None,
        log: TextIO | None,
    ) -> None:
        self._session, self._facts, self._questions, self._view = session, facts, questions, view
        self._standing, self._log = standing, log
        self._standing_due = False
        self._answers = 0

    def run(self) -> int:
        """Watch and answer until there is nothing left to do; the exit code."""
        code = 0
        try:
            while not self._questions.quit:
                if not self._facts.ended:
                    code = self._watch()
                elif not self._questions:
                    if self._questions.closed:
                        break
                    time.sleep(_WAIT_SECONDS)
                self._answer_all()
        except KeyboardInterrupt:
            self._facts.ended = self._facts.ended or "interrupted"
        return code

    def summary(self) -> str:
        """The last line."""
        told = [
            self._facts.ended or "left",
            *self._facts.lines(),
            f"{self._answers} answer{'' if self._answers == 1 else 's'}",
        ]
        return " · ".join(filter(None, told))

    def _watch(self) -> int:
        """Let the stream go on until somebody asks or it ends."""
        try:
            self._session.watch(on_step=self._on_step, pause=self._pause)
        except StateKVError as error:
            self._facts.ended = "ended"
            self._view.say(str(error))
            return 1
        if not self._pause():
            self._facts.ended = "ended"
        return 0

    def _on_step(self, progress: Progress) -> None:
        self._facts.step(progress)
        self._view.step()
        if self._standing is not None and self._standing.due(progress.pts_seconds):
            self._standing_due = True

    def _pause(self) -> bool:
        # Before the first frame there is nothing to ask about: questions wait for it.
        asked = bool(self._questions) and self._session.frames > 0
        return self._questions.quit or self._standing_due or asked

    def _answer_all(self) -> None:
        if self._standing is not None and self._standing_due:
            self._standing_due = False
            self._answer(self._standing.question, standing=True)
        while not self._questions.quit and (self._session.frames or self._facts.ended):
            question = self._questions.take()
            if question is None:
                return
            self._answer(question, standing=False)

    def _answer(self, question: str, standing: bool) -> None:
        before, text = self._session.seconds.answer, ""
        self._view.asked(question, clock(self._facts.pts_seconds))
        try:
            for piece in self._session.stream(question):
                text += piece
                self._view.piece(piece)
        except StateKVError as error:
            self._view.say(str(error))
            return
        finally:
            self._view.answered()
        self._answers += 1
        if self._log is not None:
            self._log.write(json.dumps(self._record(question, text, standing, before), ensure_ascii=False) + "\n")
            self._log.flush()

    def _record(self, question: str, text: str, standing: bool, before: float) -> dict[str, Any]:
        live = self._session.live
        return {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "pts_seconds": self._facts.pts_seconds,
            "question": question,
            "text": text,
            "standing": standing,
            "answer_seconds": self._session.seconds.answer - before,
            "frames": self._session.frames,
            "dropped": live.dropped if live is not None else 0,
            "gaps": live.gaps if live is not None else 0,
        }


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
