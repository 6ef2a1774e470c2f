"""What `statekv watch` shows: a screen with a prompt on a terminal, plain lines in a pipe."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from statistics import median
from types import TracebackType
from typing import TYPE_CHECKING

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from statekv.capacity import told
from statekv.cli.console import notes
from statekv.cli.durations import clock
from statekv.cli.keyboard import Line

if TYPE_CHECKING:
    from statekv.engine.progress import Progress
    from statekv.engine.session import Session

_PLAIN_SECONDS = 10.0  # between two lines about the stream
_REFRESHES_PER_SECOND = 8


@dataclass
class Facts:
    """What is known of a stream, in words.

    Attributes:
        session: the stream.
        name: of its source.
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
            held = {tier: size for tier, size in self.session.state.nbytes.items() if size}
            work = [f"{1000 * median(self._steps):.1f} ms per step", f"{newest.carried:,} tokens carried"]
            work += [f"{tier} {told(size)}" for tier, size in held.items()]
        return [" · ".join(stream), " · ".join(work)]


class Screen:
    """State on top, the answer that is being given below it, then the prompt; what was answered scrolls away above.

    Args:
        facts: shown anew several times a second.
        line: what is being typed.
    """

    def __init__(self, facts: Facts, line: Line) -> None:
        self._facts = facts
        self._line = line
        self._question, self._answer = "", ""
        self._console = Console(highlight=False)
        self._live = Live(
            get_renderable=self._draw,
            console=self._console,
            refresh_per_second=_REFRESHES_PER_SECOND,
            transient=True,
        )

    def __enter__(self) -> Screen:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._line.text = ""
        self._live.stop()

    def step(self) -> None:
        """A step has entered; the next refresh shows it."""

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
    """Questions and answers as lines on standard output, the stream's state now and then on standard error."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._told_at = time.monotonic()

    def __enter__(self) -> Plain:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def step(self) -> None:
        """A step has entered."""
        if time.monotonic() - self._told_at >= _PLAIN_SECONDS:
            self._told_at = time.monotonic()
            self.say(" · ".join((self._facts.state, *self._facts.lines())))

    def asked(self, question: str, at: str) -> None:
        """An answer begins."""
        typer.echo(f"[{at}] {question}")

    def piece(self, text: str) -> None:
        """It goes on."""
        typer.echo(text, nl=False)

    def answered(self) -> None:
        """It is done, or was left off."""
        typer.echo()

    def say(self, text: str) -> None:
        """Something about the work."""
        notes.print(f"statekv: {text}", markup=False, soft_wrap=True)
