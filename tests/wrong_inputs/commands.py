"""Command lines with one option of a wrong kind, or an option that does not go with the rest."""

from __future__ import annotations

import contextlib
import io
import random
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import typer

from statekv import cli
from statekv.errors import ConfigError
from tests.cli.test_cli import command
from tests.video.fixtures.clips import write_clip
from tests.wrong_inputs.trying import Try, WrongAnswerError

_ODD = (
    *("", " ", "x", "-1", "0", "1", "nan", "inf", "1e400", "9" * 30, "1.5", "\udcff", "a\0b", "é", "--", "-", "none"),
    *("/nowhere/x", "/dev/full", "/", "x" * 300, "http://[::1/x", "a:b", "accumulated(decay=2", "statekv", "os:system"),
)
_LINES = (
    *("ask CLIP what?", "watch CLIP", "analyze CLIP --csv FOLDER/a.csv", "models", "film FOLDER/f.mp4 --seconds 1"),
    *("demo --videos 1 --frames 20 --folder FOLDER/demo", "eval report FOLDER", "eval picture FOLDER --file FOLDER/p"),
    "eval run cards FOLDER/films --frames 128 --videos 1 --method statekv --budgets 20 --out FOLDER/results",
    "bench flops --models internvl3-1b --budgets 64 --frames 4 --csv FOLDER/rows.csv",
    "bench attention --models internvl3-1b --budgets 16 --queries 8 --runs 1 --csv FOLDER/rows.csv",
    "bench prefill --models internvl3-1b --layers 1 --budgets 16 --steps 1 --tokens 8 --runs 1 --csv FOLDER/rows.csv",
    "bench answer --models internvl3-1b --layers 1 --steps 1 --tokens 8 --answer 2 --runs 1 --csv FOLDER/rows.csv",
    "bench sessions --sessions 1 --tokens 8 --budget 16 --runs 1 --csv FOLDER/rows.csv",
    "bench video CLIP --runs 1 --csv FOLDER/rows.csv",
)
_CODES = (0, 1, 2, 130)


def tries(folder: Path, seed: int, count: int) -> Iterator[Try]:
    """So many lines, drawn at random."""
    drawn, clip = random.Random(seed), write_clip(folder / "clip.mp4", range(0, 100, 25))
    for _ in range(count):
        words = drawn.choice(_LINES).replace("CLIP", str(clip)).replace("FOLDER", str(folder)).split()
        for name, takes in drawn.sample(options := _options(words), min(len(options), drawn.choice((1, 1, 2, 3)))):
            words += [name, *([drawn.choice(_ODD)] if takes else [])]
        yield Try(" ".join(words), partial(_run, words, folder))


def _options(words: list[str]) -> list[tuple[str, bool]]:
    """Each option of the line's command, and whether it takes a value."""
    found: Any = typer.main.get_command(cli.app)
    for word in words[:2]:
        found = getattr(found, "commands", {}).get(word, found)
    options = [each for each in found.params if each.param_type_name == "option"]
    return [(word, not each.is_flag) for each in options for word in (*each.opts, *each.secondary_opts)]


def _run(words: list[str], folder: Path) -> None:
    """What is refused is told in one line on standard error, and the code says so."""
    with contextlib.chdir(folder), mock.patch.object(sys, "stdin", io.StringIO("what?\n")):
        done = command(*words)
    lines = [line for line in done.err.splitlines() if "warning: " not in line]
    if "Traceback" in done.err or done.code not in _CODES:
        raise WrongAnswerError(f"code {done.code}: {done.err}")
    if done.code == 1 and not (len(lines) == 1 and lines[0].startswith("statekv: ")):
        raise WrongAnswerError(f"not one line: {done.err}")
    if done.code == 0 and not done.out and words[0] in ("ask", "models"):
        raise WrongAnswerError("no answer, and no word")
    if done.code:
        raise ConfigError(lines[-1])
