"""Disks on which there is room for so many bytes of a file and no more, for all that writes."""

from __future__ import annotations

import csv
import io
import json
import random
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from statekv.cache.folder import FACTS
from statekv.errors import OutputError
from statekv.video.file import count_frames
from tests.cache.test_folder import files_of_at_most
from tests.cli.test_cli import COUNT, Result, command
from tests.talk import shared_engine, some_frames
from tests.video.fixtures.clips import write_clip
from tests.wrong_inputs.trying import Try, WrongAnswerError

CARDS = "eval cards FOLDER/films --frames 128 --videos 1 --budgets 20 --method statekv --out FOLDER/results"


class _Line(NamedTuple):
    """A command line that writes, and what reads what it leaves in a folder: that must be whole, or not there."""

    words: str
    whole: Callable[[Path], object]


def _session(folder: Path) -> None:
    if (folder / "kept" / FACTS).exists():
        done = command("ask", "--restore", folder / "kept", COUNT)
        if done.code or not done.out:
            raise WrongAnswerError(f"what was saved is not whole: {done.err}")


def _film(folder: Path) -> None:
    for file in folder.rglob("*.mp4"):
        count_frames(file)


def _answers(folder: Path) -> None:
    for file in folder.glob("*.jsonl"):
        [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _rows(folder: Path) -> None:
    for file in folder.glob("*.csv"):
        with file.open(newline="", encoding="utf-8") as opened:
            rows = list(csv.reader(opened))
        if {len(row) for row in rows} - {len(rows[0])} if rows else ():
            raise WrongAnswerError(f"{file.name} has a row that is cut off")


_LINES = (
    _Line("ask CLIP what? --save FOLDER/kept", _session),
    _Line("watch CLIP --save FOLDER/kept --autosave 0.0001s", _session),
    _Line("watch CLIP --ask-every 1s what? --log FOLDER/log.jsonl", _answers),
    _Line("film FOLDER/film.mp4 --seconds 2", _film),
    _Line("demo --videos 1 --frames 20 --folder FOLDER", _film),
    _Line(CARDS, _film),
    _Line("analyze CLIP --out FOLDER", _rows),
    _Line("bench flops --models internvl3-1b --budgets 256 --frames 4 --csv FOLDER/rows.csv", _rows),
)
FINE = ("statekv: ", "rows: ", "in ", "results: ", "time per step: ")  # what may begin a line
_LARGEST = 22  # bits of the most bytes that a file may have


def tries(folder: Path, seed: int, count: int) -> Iterator[Try]:
    """Sessions that are saved and lines in turn, with room drawn at random."""
    drawn, clip = random.Random(seed), write_clip(folder / "clip.mp4", range(0, 200, 25))
    room, ways = folder / "room", (_save, _tier, *_LINES)
    for number in range(count):
        most, way = int(2 ** drawn.uniform(0, _LARGEST)), ways[number % len(ways)]
        if isinstance(way, _Line):
            words = way.words.replace("CLIP", str(clip)).replace("FOLDER", str(room)).split()
            yield Try(f"{way.words}, {most} bytes", partial(_run, words, way.whole, room, most))
        else:
            yield Try(f"{way.__name__}, {most} bytes", partial(way, room, most))


def _save(room: Path, most: int) -> None:
    """The old save, or the new one, answers as before."""
    shutil.rmtree(room, ignore_errors=True)
    engine = shared_engine("qwen3_vl")
    with engine.open(budget=20, vision_batch=2) as session:
        session.push(some_frames(3))
        session.save(room)
        old = session.logits("What?")
        session.push(some_frames(9)[3:])
        new, failed = session.logits("What?"), None
        try:
            with files_of_at_most(most):
                session.save(room)
        except Exception as error:
            failed = error
    with engine.restore(room) as found:
        if not torch.equal(found.logits("What?"), new if failed is None else old):
            raise WrongAnswerError("what was saved answers something else")
    if failed is not None:
        raise failed


def _tier(room: Path, most: int) -> None:
    """What the disk does not take is told, or nothing is missing."""
    settings = {"budget": 20, "memory": 800_000, "disk": 10**7, "disk_folder": str(room)}
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir()
    with warnings.catch_warnings(record=True) as told, files_of_at_most(most):
        warnings.simplefilter("always")
        found = _answered(settings)
    if not told and not torch.equal(found, _answered(settings)):
        raise WrongAnswerError("steps are missing without a word")
    if left := [*room.rglob("*")]:
        raise WrongAnswerError(f"{left} are left behind")


def _answered(settings: dict[str, Any]) -> torch.Tensor:
    with shared_engine("internvl").open(**settings) as session:
        session.push(some_frames(20))
        return session.logits("What?")


def _run(words: Sequence[str], whole: Callable[[Path], object], room: Path, most: int) -> None:
    """It says in a line that there is no room, leaves nothing that is cut off, and goes well where there is room."""
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir()
    with files_of_at_most(most):
        done = _done(words)
    _check(done, (0, 1))
    if done.code and not any("cannot be written" in line for line in done.err.splitlines()):
        raise WrongAnswerError(f"code {done.code}, and no word about room: {done.err}")
    if left := [path.name for path in room.rglob("*") if path.name.endswith((".part", ".new", ".tmp"))]:
        raise WrongAnswerError(f"{left} are left behind")
    whole(room)
    if done.code:
        _check(_done(words), (0,))
        whole(room)
        raise OutputError(done.err.splitlines()[0])


def _done(words: Sequence[str]) -> Result:
    with mock.patch.object(sys, "stdin", io.StringIO("what?\n")):
        return command(*words)


def _check(done: Result, codes: Sequence[int]) -> None:
    strange = [
        line
        for line in done.err.splitlines()
        if not line.startswith(("statekv: ", "rows: ", "in ", "results: ", "time per step: "))
    ]
    if done.code not in codes or strange:
        raise WrongAnswerError(f"code {done.code}: {done.err}")
