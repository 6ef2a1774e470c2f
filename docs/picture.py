"""The README's picture, made anew: python docs/picture.py

Writes a film of a minute, runs `statekv ask` and `statekv watch` on it in a pseudo-terminal, types questions as a
person would, and draws what the terminal showed as docs/img/terminal.svg. Nothing in it is written by hand.
"""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from statekv.evals.cards import write_film, write_story

PICTURE = Path(__file__).parent / "img" / "terminal.svg"
COLUMNS, ROWS = 84, 40
ASK = ["ask", "film.mp4", "how many cards?", "what shape was the red card?", "--budget", "256"]
WATCH = ["watch", "film.mp4", "--realtime", "--budget", "256"]
# When the stream shows these times: what is typed. The last line is left standing as it is being typed.
TYPED = [("0:00:34", "how many cards?\n"), ("0:00:45", "what came after the red card?\n"), ("0:00:51", "how many ca")]
_CONTROL = re.compile(r"(\x1b\[[0-9;?]*[A-Za-z]|\r|\n)")
_CUT_OFF = re.compile(r"\x1b(\[[0-9;?]*)?$")
_PATIENCE_SECONDS = 180.0


class Terminal:
    """A command in a pseudo-terminal, and the lines that it shows.

    Of a terminal's language it knows what rich's live display speaks: colours, next line, one line up, erase the line.
    """

    def __init__(self, arguments: list[str], folder: str) -> None:
        self.lines = [""]
        self._row, self._rest = 0, ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # of loading weights
        environment = {**os.environ, **quiet, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
        command = [sys.executable, "-m", "statekv", *arguments]
        streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
        self.process = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **streams)
        os.close(theirs)
        self._ours = ours

    def watch_until(self, enough: Callable[[Terminal], bool]) -> None:
        """Read what is shown until that is enough, or the command has ended."""
        ends = time.monotonic() + _PATIENCE_SECONDS
        while not enough(self) and time.monotonic() < ends:
            if not select.select([self._ours], [], [], 0.1)[0]:
                continue
            try:
                data = os.read(self._ours, 65536)
            except OSError:  # the other end is closed
                return
            self._show(data)

    def shows(self, text: str) -> bool:
        """Whether a line has this text."""
        return any(text in _CONTROL.sub("", line) for line in self.lines)

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._ours, text.encode())

    def end(self) -> None:
        """Ctrl-C, and wait."""
        self.process.send_signal(signal.SIGINT)
        self.watch_until(lambda _: self.process.poll() is not None)
        self.process.wait(_PATIENCE_SECONDS)
        os.close(self._ours)

    def _show(self, data: bytes) -> None:
        text = self._rest + self._decoder.decode(data)
        cut = _CUT_OFF.search(text)
        whole = cut.start() if cut else len(text)
        self._rest = text[whole:]
        for part in _CONTROL.split(text[:whole]):
            if part == "\n":
                self._row += 1
                self.lines += [""] * (self._row + 1 - len(self.lines))
            elif part.endswith("A") and part.startswith("\x1b"):
                self._row -= 1
            elif part == "\x1b[2K":
                self.lines[self._row] = ""
            elif not part.startswith("\x1b") or part.endswith("m"):
                self.lines[self._row] += part.replace("\r", "")


def asked(folder: str) -> list[str]:
    """What `statekv ask` has shown when it is done."""
    terminal = Terminal(ASK, folder)
    terminal.watch_until(lambda _: False)
    terminal.process.wait(_PATIENCE_SECONDS)
    return terminal.lines


def watched(folder: str) -> list[str]:
    """What `statekv watch` shows while a question is being typed."""
    terminal = Terminal(WATCH, folder)
    for moment, text in TYPED:
        terminal.watch_until(lambda terminal, moment=moment: terminal.shows(moment + " · "))
        terminal.type(text)
    last = TYPED[-1][1]
    terminal.watch_until(lambda terminal: terminal.shows(f"? {last}"))
    shown = list(terminal.lines)
    terminal.end()
    return shown


def draw(parts: list[tuple[list[str], list[str]]]) -> str:
    """An SVG picture of commands and what they showed."""
    console = Console(width=COLUMNS, record=True, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    for arguments, lines in parts:
        words = [f'"{word}"' if " " in word else word for word in arguments]
        console.print(Text.assemble(("$ ", "bold green"), ("statekv " + " ".join(words), "bold")))
        text = "\n".join(line.rstrip() for line in lines).strip("\n")
        console.print(Text.from_ansi(text))
        console.print()
    picture = console.export_svg(title="statekv", theme=MONOKAI, unique_id="statekv")
    # Readers of the docs fetch no fonts from elsewhere; the system's monospace does.
    return re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_film(write_story(seed=7, duration_seconds=60), Path(folder, "film.mp4"))
        picture = draw([(ASK, asked(folder)), (WATCH, watched(folder))])
    PICTURE.write_text(picture + "\n", encoding="utf-8")
    print(PICTURE)


if __name__ == "__main__":
    main()
