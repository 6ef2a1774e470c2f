"""Commands that are told to end, by each signal that says so, at any moment."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from statekv.cache.folder import FACTS, read_folder
from statekv.errors import StateKVError
from statekv.video.file import count_frames
from tests.cli.test_cli import command
from tests.processes.forked import ROOT, Process
from tests.video.fixtures.clips import write_clip
from tests.wrong_inputs.disks import CARDS, FINE
from tests.wrong_inputs.trying import Try, WrongAnswerError

_ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# The signal comes with so many calls of Python's functions, and the frames that a session has seen are told at its end.
_FIRST = """
import os, sys
from statekv.engine.session import Session

left = {calls}

def count(frame, event, argument):
    global left
    left -= event == "call"
    if left <= 0:
        sys.setprofile(None)
        os.kill(os.getpid(), {number})

def tell(self, *error):
    with open({seen!r}, "w") as file:
        file.write(str(self.frames))
    return leave(self, *error)

leave, Session.__exit__ = Session.__exit__, tell
sys.setprofile(count)
"""


class _Line(NamedTuple):
    """A command line; about how many calls it makes; and what must hold of its folder then, given the frames that were
    seen.
    """

    words: str
    calls: int
    check: Callable[[Path, int], object]


def _saved(folder: Path, seen: int) -> None:
    """All that was seen is there."""
    if seen and not (folder / "kept" / FACTS).exists():
        raise WrongAnswerError(f"{seen} frames were seen and are not saved")
    if seen and (found := read_folder(folder / "kept").facts["stream"]["frames"]) != seen:
        raise WrongAnswerError(f"{seen} frames were seen, and {found} are saved")


def _films(folder: Path, _: int) -> None:
    for film in folder.rglob("*.mp4"):
        count_frames(film)
    if left := [path.name for path in folder.rglob("*.part")]:
        raise WrongAnswerError(f"{left} are left behind")
    if any(path.is_dir() and not any(path.iterdir()) for path in folder.rglob("*")):
        raise WrongAnswerError("an empty folder is left behind")


def _nothing(folder: Path, _: int) -> None:
    """What it writes is written when all is known."""


_LINES = (
    _Line("ask CLIP what? --save FOLDER/kept", 480_000, _saved),
    _Line("watch CLIP --save FOLDER/kept", 480_000, _saved),
    _Line("ask --restore FOLDER/kept what? --save FOLDER/kept", 470_000, _saved),
    _Line("watch CLIP --save FOLDER/kept --restore FOLDER/kept --autosave 0.0001s", 460_000, _saved),
    _Line("film FOLDER/film.mp4 --seconds 2", 70_000, _films),
    _Line("analyze CLIP --out FOLDER", 1_900_000, _nothing),
    _Line("demo --videos 1 --frames 20 --folder FOLDER/demo", 1_200_000, _films),
    _Line(CARDS, 2_000_000, _films),
)


def tries(folder: Path, seed: int, count: int) -> Iterator[Try]:
    """Lines in turn, the last of each turn started anew; the signal and its moment are drawn at random."""
    drawn, clip = random.Random(seed), write_clip(folder / "clip.mp4", range(0, 200, 25))
    for number in range(count):
        place, ending = folder / str(number), drawn.choice(_ENDINGS)
        place.mkdir()
        turn = number % (len(_LINES) + 1)
        if turn == len(_LINES):
            seconds = drawn.uniform(0.0, 5.0)
            yield Try(f"{ending.name} {seconds:.2f} s after the start", partial(_start, clip, ending, seconds))
            continue
        line = _LINES[turn]
        words = line.words.replace("CLIP", str(clip)).replace("FOLDER", str(place)).split()
        if "--restore" in words:
            command("ask", clip, "what?", "--save", place / "kept", "--max-frames", "3")
        calls = drawn.randrange(line.calls)
        yield Try(f"{ending.name} with call {calls} of {line.words}", partial(_end, words, line, place, ending, calls))


def _end(words: Sequence[str], line: _Line, place: Path, ending: signal.Signals, calls: int) -> None:
    seen = place / "seen"
    first = _FIRST.format(calls=calls, number=ending.value, seen=str(seen))
    with open(os.devnull) as nothing, tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as told:
        streams = nothing.fileno(), said.fileno(), told.fileno()
        process = Process(*words, streams=streams, first=first)
        try:
            code = process.wait()
        finally:
            process.kill()
        told.seek(0)
        _check(code, told.read(), ending)
    line.check(place, int(seen.read_text()) if seen.exists() else 0)


def _start(clip: Path, ending: signal.Signals, seconds: float) -> None:
    line = [sys.executable, "-m", "statekv", "ask", str(clip), "what?"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        time.sleep(seconds)
        process.send_signal(ending)
        _, told = process.communicate()
    finally:
        process.kill()
    _check(process.returncode, told, ending)


def _check(code: int, told: str, ending: signal.Signals) -> None:
    """A word and 130; nothing where it came too late; and before and behind all work the system's own end."""
    lines = [line for line in told.splitlines() if "warning: " not in line]
    strange = [line for line in lines if not line.startswith(FINE)]
    if code not in (0, 130, -ending) or strange:
        raise WrongAnswerError(f"code {code}: {told}")
    if code == 130 and "interrupted" not in lines[-1]:
        raise WrongAnswerError(f"not a word: {told}")
    if code:
        raise StateKVError(lines[-1] if lines else "ended by the system")
