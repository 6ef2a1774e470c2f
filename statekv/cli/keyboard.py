"""Questions as they are typed, while the program does something else."""

from __future__ import annotations

import codecs
import contextlib
import os
import select
import sys
import threading
from collections import deque
from collections.abc import Iterator
from queue import Empty, SimpleQueue
from typing import Any

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


def _lines(questions: Questions, source: Any) -> None:
    with contextlib.suppress(OSError, ValueError):  # closed while we read
        for line in source:
            questions.add(line)
    questions.closed = True
