"""What `statekv watch` shows, and questions as they are typed meanwhile."""

from __future__ import annotations

import codecs
import contextlib
import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from statistics import median
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from statekv.cli import console
from statekv.cli.options import clock
from statekv.config import told

if TYPE_CHECKING:
    from statekv.engine.progress import Progress
    from statekv.engine.session import Session


_REFRESHES_PER_SECOND = 8


@dataclass
class Facts:
    """What is known of a stream, in words.

    Attributes:
        ended: why nothing more enters; empty while it goes on.
        saved: when it was saved last; empty where it was not.
    """

    session: Session
    name: str
    ended: str = ""
    saved: str = ""
    _newest: Progress | None = None
    _spent: float = 0.0
    _steps: deque[float] = field(default_factory=lambda: deque(maxlen=32))

    @property
    def pts_seconds(self) -> float:
        """Time of the newest step, also of one in a session that was restored."""
        if self._newest is not None:
            return self._newest.pts_seconds
        return (
            next((span.pts_seconds for span in reversed(self.session.state.spans) if span.kind == "step"), None) or 0.0
        )

    def step(self, progress: Progress) -> None:
        """A step has entered."""
        spent = self.session.seconds.vision + self.session.seconds.prefill
        self._steps.append(spent - self._spent)
        self._newest, self._spent = progress, spent

    @property
    def state(self) -> str:
        """One word or a few."""
        live = self.session.live
        if self.ended:
            return self.ended
        if live is None:
            return "playing"
        return "live" if live.connected else "away, calling again"

    def lines(self) -> list[str]:
        """Time, lag and drops; then speed and memory."""
        live, newest = self.session.live, self._newest
        stream = [clock(self.pts_seconds), f"{self.session.frames} frames"]
        if live is not None:
            lag = newest.live.lag_seconds if newest is not None and newest.live is not None else 0.0
            stream += [f"lag {lag:.1f} s", f"{live.dropped} dropped"]
            if live.gaps:
                stream.append(f"{live.gaps} gaps ({live.gap_seconds:.1f} s)")
        if self.session.state.forgotten:
            stream.append(f"{self.session.state.forgotten:,} steps forgotten")
        if self.saved:
            stream.append(self.saved)
        work = []
        if newest is not None:
            used = self.session.state.used
            held = {tier: size for tier, size in self.session.state.nbytes.items() if size}
            work = [f"{1000 * median(self._steps):.1f} ms per step", f"{newest.carried:,} tokens carried"]
            work += [f"{tier} {_share(used[tier], size)}" for tier, size in held.items()]
        return [" · ".join(stream), " · ".join(work)]


def _share(used: int, reserved: int) -> str:
    """Two amounts, or one where all is used."""
    return told(reserved) if used == reserved else f"{told(used)} of {told(reserved)}"


class Screen:
    """State on top, the answer that is being given below it, then the prompt; what was answered scrolls away above."""

    def __init__(self, facts: Facts, line: Line) -> None:
        self._facts = facts
        self._line = line
        self._question, self._answer = "", ""
        self._console = Console(highlight=False)
        self._live = Live(
            get_renderable=self._draw, console=self._console, refresh_per_second=_REFRESHES_PER_SECOND, transient=True
        )

    def __enter__(self) -> Screen:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._line.text = ""
        self._live.stop()

    def tick(self) -> None:
        """Time goes on, with steps or without; the next refresh shows it."""

    def asked(self, question: str, at: str) -> None:
        """An answer begins."""
        self._question, self._answer = f"[{at}] {question}", ""

    def piece(self, text: str) -> None:
        """It goes on."""
        self._answer += text

    def answered(self) -> None:
        """It is done, or was left off."""
        self._console.print(Text(self._question, style="bold"))
        self._console.print(Text(self._answer))
        self._question = self._answer = ""

    def say(self, text: str) -> None:
        """Something about the work."""
        self._console.print(Text(f"statekv: {text}", style="yellow"))

    def _draw(self) -> Group:
        facts, width = self._facts, self._console.width
        parts = [Text("─" * width, style="dim"), Text.assemble((facts.name, "bold"), f" · {facts.state}")]
        parts += [Text(line, style="dim", overflow="ellipsis", no_wrap=True) for line in facts.lines()]
        if self._question:
            room = max(1, self._console.height - 8) * width  # a longer answer shows its end
            parts += [Text(self._question, style="bold"), Text(self._answer[-room:])]
        prompt = Text.assemble(("? ", "bold green"), self._line.text, ("▏", "bold green"))
        return Group(*parts, prompt)


class Plain:
    """Questions and answers as lines on standard output, which stays free where whoever has the answers writes
    `records` of them there; the stream's state now and then on standard error.
    """

    def __init__(self, facts: Facts, records: bool = False) -> None:
        self._facts = facts
        self._records = records
        self._told_at = time.monotonic()

    def tick(self) -> None:
        """Time goes on, with steps or without."""
        if time.monotonic() - self._told_at >= console.SECONDS_OF_SILENCE:
            self._told_at = time.monotonic()
            console.remark(" · ".join(filter(None, (self._facts.state, *self._facts.lines()))))

    def asked(self, question: str, at: str) -> None:
        """An answer begins."""
        if not self._records:
            typer.echo(f"[{at}] {question}")

    def piece(self, text: str) -> None:
        """It goes on."""
        if not self._records:
            typer.echo(text, nl=False)

    def answered(self) -> None:
        """It is done, or was left off."""
        if not self._records:
            typer.echo()

    def say(self, text: str) -> None:
        """Something about the work."""
        console.complain(text)


_POLL_SECONDS = 0.1
_ENTER, _BACKSPACE, _KILL, _WORD, _END, _ESCAPE = "\r\n", "\x7f\b", "\x15", "\x17", "\x04", "\x1b"
QUIT = ("quit", "exit")


class Questions:
    """What waits for an answer. One thread adds, another one takes."""

    def __init__(self) -> None:
        self.quit = False
        self.closed = False  # nobody will ask any more
        self._waiting: SimpleQueue[str] = SimpleQueue()

    def add(self, line: str) -> None:
        """Take down a line as it was typed; empty ones are nothing."""
        line = line.strip()
        if line in QUIT:
            self.quit = True
        elif line:
            self._waiting.put(line)

    def __bool__(self) -> bool:
        return not self._waiting.empty()

    def take(self) -> str | None:
        """The one that has waited longest."""
        with contextlib.suppress(Empty):
            return self._waiting.get_nowait()
        return None


class Line:
    """A line that is being typed."""

    def __init__(self) -> None:
        self.text = ""
        self.ended = False  # Ctrl-D on an empty line
        self._escaped = ""

    def press(self, character: str) -> str | None:
        """Let a key change the line; a finished line is returned."""
        if self._escaped:
            # ESC [ … letter: an arrow or another key that means nothing here.
            self._escaped += character
            if character != "[" and (character.isalpha() or character == "~"):
                self._escaped = ""
        elif character in _ENTER:
            done, self.text = self.text, ""
            return done
        elif character in _BACKSPACE:
            self.text = self.text[:-1]
        elif character == _KILL:
            self.text = ""
        elif character == _WORD:
            self.text = self.text.rstrip().rpartition(" ")[0]
        elif character == _END:
            self.ended = self.ended or not self.text
        elif character == _ESCAPE:
            self._escaped = character
        elif character.isprintable():
            self.text += character
        return None


@contextlib.contextmanager
def typed_keys(terminal: int, line: Line, questions: Questions) -> Iterator[None]:
    """Read keys from a terminal on a thread, one by one and without echo, for as long as the block lasts."""
    import termios
    import tty

    before = termios.tcgetattr(terminal)
    stopped = threading.Event()
    thread = threading.Thread(target=_keys, args=(terminal, line, questions, stopped), daemon=True)
    tty.setcbreak(terminal, termios.TCSANOW)  # keeps what was typed while the model was loading
    try:
        thread.start()
        yield
    finally:
        stopped.set()
        thread.join()
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def piped(questions: Questions, source: Any) -> None:
    """Read questions line by line from a file or pipe, on a thread that ends with it."""
    threading.Thread(target=_lines, args=(questions, source), daemon=True).start()


def find_terminal(stdin_is_video: bool) -> int | None:
    """A descriptor to read keys from, where answers go to a terminal and there is a keyboard."""
    if sys.platform == "win32" or not sys.stdout.isatty():
        return None
    if not stdin_is_video:
        return 0 if os.isatty(0) else None
    with contextlib.suppress(OSError):
        return os.open("/dev/tty", os.O_RDONLY)
    return None


def _keys(terminal: int, line: Line, questions: Questions, stopped: threading.Event) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    pressed: deque[str] = deque()
    while not stopped.is_set() and not questions.quit:
        if not select.select([terminal], [], [], _POLL_SECONDS)[0]:
            continue
        with contextlib.suppress(OSError):
            data = os.read(terminal, 1024)
            line.ended = line.ended or not data
            pressed.extend(decoder.decode(data))
        while pressed:
            if (done := line.press(pressed.popleft())) is not None:
                questions.add(done)
        questions.quit = questions.quit or line.ended


_LONGEST_LINE = 1 << 16  # bytes


def _lines(questions: Questions, source: Any) -> None:
    try:
        with contextlib.suppress(OSError, ValueError):  # closed while we read
            _read_lines(questions, getattr(source, "buffer", source))
    finally:
        questions.closed = True


def _read_lines(questions: Questions, source: Any) -> None:
    while source is not None and (line := source.readline(_LONGEST_LINE)):
        if len(line) == _LONGEST_LINE:
            console.complain("standard input has a line without end, and is read no further")
            return
        try:
            questions.add(line.decode() if isinstance(line, bytes) else line)
        except UnicodeDecodeError:
            console.complain(
                f"a line of standard input is not UTF-8 text, and is left out: {line.decode(errors='replace').strip()}"
            )
