"""`statekv watch`: a stream and its questions, in a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from statekv.cli import options
from statekv.cli.ask import check_place, check_target, load_again
from statekv.cli.console import load, remark, to_json
from statekv.cli.options import as_option, clock, seconds_of
from statekv.cli.terminal import Facts, Line, Plain, Questions, Screen, find_terminal, piped, typed_keys
from statekv.config import Config
from statekv.errors import ConfigError, MemoryLimitError, OutputError, SaveError, StateKVError
from statekv.video.address import display_name

if TYPE_CHECKING:
    from statekv.engine.engine import Engine
    from statekv.engine.progress import Progress
    from statekv.engine.session import Session


VideoSource = Annotated[
    str, typer.Argument(help="A file, a URL, a camera (/dev/video0), or - for a pipe.", show_default=False)
]
Realtime = Annotated[bool, typer.Option("--realtime", help="Show a file as if it were live.")]
AskEvery = Annotated[
    tuple[str, str] | None,
    typer.Option(help="A time of the stream and a question that is asked so often: 30s 'what happens?'"),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object per answer, and no screen.")]
Log = Annotated[Path | None, typer.Option(help="Append each answer to this file, one JSON object per line.")]
Autosave = Annotated[str | None, typer.Option(help="How often the stream is saved to the folder of --save: 60s, 5m.")]
Restore = Annotated[
    Path | None,
    typer.Option(
        help="Go on with what --save kept. Where both name one folder, nothing need be in it at the first start."
    ),
]


@options.generated()
def watch(
    source: VideoSource,
    *,
    realtime: Realtime = False,
    ask_every: AskEvery = None,
    log: Log = None,
    as_json: AsJson = False,
    save: options.Save = None,
    autosave: Autosave = None,
    restore: Restore = None,
    loading: options.Loading,
    method: options.Method = None,
    settings: options.Settings,
    stream: options.VideoStream = None,
) -> None:
    """Watch SOURCE as it comes and answer questions meanwhile; quit or Ctrl-C ends it."""
    standing = StandingQuestion(seconds_of(ask_every[0], "--ask-every"), ask_every[1]) if ask_every else None
    every_seconds = _every_seconds(save, autosave)
    if restore is None:
        Config.of(method, **settings)
    check_place(source, settings, realtime)
    check_target(save)
    restored = _restored(save, restore)
    with ExitStack() as stack:
        answers = stack.enter_context(closing(AnswerLog(log))) if log is not None else None
        if restored is None:
            engine = load(**loading, method=method, **settings)
        else:
            _, engine = load_again(restored, loading, method=method, stream=stream)
        if standing is not None:
            engine.check_question(standing.question)
        if restored is None:
            session = engine.open(source, stream=stream, realtime=realtime, **settings)
        else:
            session = _again(engine, restored, source, settings, realtime)
        stack.enter_context(session)
        facts, questions = Facts(session, display_name(source)), Questions()
        view = _view(stack, facts, questions, source == "-", as_json)
        keeper = Keeper(session, save, every_seconds, view.say, restored is not None and restored == save)
        watching = Watching(session, facts, questions, view, standing, answers, as_json, keeper)
        code = watching.run()
        summary = watching.summary()
    remark(summary)
    raise typer.Exit(code)


def _view(stack: ExitStack, facts: Facts, questions: Questions, stdin_is_video: bool, as_json: bool) -> Screen | Plain:
    """Where questions come from and answers go to, for as long as the stack lasts."""
    terminal = None if as_json else find_terminal(stdin_is_video)
    if terminal is not None:
        line = Line()
        stack.enter_context(typed_keys(terminal, line, questions))
        return stack.enter_context(Screen(facts, line))
    if stdin_is_video:
        questions.closed = True
    else:
        piped(questions, sys.stdin)
    return Plain(facts, as_json)


def _again(engine: Engine, folder: Path, source: str, settings: dict[str, Any], realtime: bool) -> Session:
    session = engine.restore(folder, source, **settings)
    if realtime and session.live is None:
        rule = "--realtime was given with --restore, but a session stays as it was opened"
        raise ConfigError(rule, "leave --realtime out, or watch the video again")
    return session


def _restored(save: Path | None, restore: Path | None) -> Path | None:
    """The folder to go on from; None where it is the one to save to, and nothing has been saved yet."""
    from statekv.cache.folder import FACTS

    return None if restore is None or (restore == save and not (restore / FACTS).exists()) else restore


def _every_seconds(save: Path | None, autosave: str | None) -> float | None:
    if autosave is None:
        return None
    if save is None:
        raise ConfigError(f"--autosave is {autosave!r}, but nothing says where to save", "add --save FOLDER")
    return seconds_of(autosave, "--autosave")


class AnswerLog:
    """Answers in a file, appended a line each; `failed` says whether one is missing.

    One that cannot be written is told once, not each time that it fails again; the stream goes on.

    Raises:
        ConfigError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path, self.failed = path, False
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be written: {(error.strerror or '').lower()}", "name another file"
            ) from None

    def write(self, line: str, say: Callable[[str], None]) -> None:
        """Append a line, or nothing of it; a failure is said."""
        left, written = f"{line}\n".encode(errors="backslashreplace"), 0
        try:
            while left:
                done = self._file.write(left) or 0
                left, written = left[done:], written + done
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(self._file.tell() - written)
            if not self.failed:
                say(f"{self._path} cannot be written: {(error.strerror or '').lower()}; this answer is not in it")
            self.failed = True

    def close(self) -> None:
        """The end of it."""
        with suppress(OSError):
            self._file.close()


_WAIT_SECONDS = 0.1


class StandingQuestion:
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
    """A stream that goes on between its questions."""

    def __init__(
        self,
        session: Session,
        facts: Facts,
        questions: Questions,
        view: Screen | Plain,
        standing: StandingQuestion | None,
        log: AnswerLog | None,
        as_json: bool,
        keeper: Keeper,
    ) -> None:
        self._session, self._facts, self._questions, self._view = session, facts, questions, view
        self._standing, self._keeper = standing, keeper
        self._log, self._as_json = log, as_json
        self._standing_due = False
        self._answers = 0

    def run(self) -> int:
        """Watch and answer until there is nothing left to do, then save; the exit code."""
        code = 0
        try:
            while not self._questions.quit:
                if not self._facts.ended:
                    code = self._watch()
                elif not self._questions:
                    if self._questions.closed:
                        break
                    time.sleep(_WAIT_SECONDS)
                if self._keeper.due():
                    self._save()
                self._answer_all()
        except KeyboardInterrupt:
            self._facts.ended = self._facts.ended or "interrupted"
        finally:
            self._save()
        return code or int(self._keeper.failed or (self._log is not None and self._log.failed))

    def summary(self) -> str:
        """The last line."""
        told = [
            self._facts.ended or "left",
            *self._facts.lines(),
            f"{self._answers} answer{'' if self._answers == 1 else 's'}",
        ]
        return " · ".join(filter(None, told))

    def _watch(self) -> int:
        """Let the stream go on until somebody asks, it is to be saved or it ends."""
        code = 0
        try:
            self._session.watch(on_step=self._on_step, pause=self._pause)
        except StateKVError as error:
            if isinstance(error, MemoryLimitError):
                self._keeper.spare()
            self._view.say(str(error.spelled(as_option)))
            code = 1
        except Exception:
            self._keeper.spare()
            raise
        if code or not self._pause():
            self._facts.ended = "ended"
            self._save()
        return code

    def _save(self) -> None:
        self._keeper.save(self._facts.pts_seconds)
        self._facts.saved = self._keeper.told

    def _on_step(self, progress: Progress) -> None:
        self._facts.step(progress)
        if self._standing is not None and self._standing.due(progress.pts_seconds):
            self._standing_due = True

    def _pause(self) -> bool:
        self._view.tick()
        # Before the first frame there is nothing to ask about: questions wait for it.
        asked = bool(self._questions) and self._session.frames > 0
        return self._questions.quit or self._standing_due or asked or self._keeper.due()

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
            # Closed at once where the reader has gone: what is in the middle of an answer cannot be saved.
            with closing(self._session.stream(question)) as pieces:
                for piece in pieces:
                    text += piece
                    self._view.piece(piece)
        except OutputError:
            raise  # nobody to answer to
        except StateKVError as error:
            self._view.say(str(error.spelled(as_option)))
            return
        finally:
            self._view.answered()
        self._answers += 1
        line = to_json(self._record(question, text, standing, before))
        if self._log is not None:
            self._log.write(line, self._view.say)
        if self._as_json:
            typer.echo(line)

    def _record(self, question: str, text: str, standing: bool, before: float) -> dict[str, Any]:
        return {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "pts_seconds": self._facts.pts_seconds,
            "question": question,
            "text": text,
            "standing": standing,
            "answer_seconds": self._session.seconds.answer - before,
            **self._session.stats(),
        }


class Keeper:
    """Saves a session now and then, and at the end.

    A save that fails is told once, not each time that it fails again; the stream goes on. What has been saved already
    is intact then.

    Args:
        folder: where it is kept; None: nowhere.
        every_seconds: between two saves; None: at the end alone.
        restored: whether the session was restored from that folder, which holds it as it is.

    Attributes:
        told: where things stand, for the view; empty as long as nothing was tried.
        failed: whether the newest try failed.
    """

    def __init__(
        self,
        session: Session,
        folder: Path | None,
        every_seconds: float | None,
        say: Callable[[str], None],
        restored: bool = False,
    ) -> None:
        self._session, self._folder, self._every_seconds, self._say = session, folder, every_seconds, say
        self._tried_at = time.monotonic()
        self._saved_frames = self._tried_frames = session.frames if restored else 0
        self._spared = False
        self.told = ""
        self.failed = False

    def due(self) -> bool:
        """Whether it is time: the last try is long enough ago, and the stream has gone on since, lest tries that fail
        hold it up.
        """
        if self._every_seconds is None or time.monotonic() - self._tried_at < self._every_seconds:
            return False
        return self._session.frames > self._tried_frames and self._something_new()

    def save(self, pts_seconds: float) -> None:
        """Save what is new, if anything is; `pts_seconds` is the time of the newest step."""
        if self._folder is None or not self._something_new():
            return
        frames = self._session.frames
        try:
            self._session.save(self._folder)
        except SaveError as error:
            if not self.failed:
                again = "; it will be tried again" if self._every_seconds is not None else ""
                self._say(f"{error}{again}")
                self.told = f"not saved since {clock(pts_seconds)}"
            self.failed = True
        else:
            self.failed, self._saved_frames = False, frames
            self.told = f"saved at {clock(pts_seconds)}"
        self._tried_at, self._tried_frames = time.monotonic(), frames

    def spare(self) -> None:
        """The session cannot go on any more: a save that can is not replaced by it."""
        self._spared = bool(self._saved_frames)

    def _something_new(self) -> bool:
        return self._session.frames > self._saved_frames and not self._spared
