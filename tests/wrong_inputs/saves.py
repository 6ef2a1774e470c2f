"""Folders of saved sessions with a bit flipped, a file changed, or facts that say something else."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from statekv.cache.folder import FACTS
from tests.talk import shared_engine, some_frames
from tests.wrong_inputs.models import GONE, ODD, changed, instead, places
from tests.wrong_inputs.trying import Try, WrongAnswerError

# Sessions whose folders differ in what they hold: an evicting cache, windows, an index of steps, blocks on disk.
_SESSIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("internvl", {"budget": 20}),
    ("qwen3_vl", {"budget": 20, "vision_batch": 4}),
    ("internvl", {"method": "streaming_llm", "budget": 20}),
    ("internvl", {"method": "rekv", "budget": 20, "retrieve": 10}),
    ("internvl", {"carry": "all", "reduce": "static(threshold=0.5)"}),
    ("internvl", {"budget": 20, "memory": 800_000, "disk": 10**7}),
)


def tries(folder: Path, seed: int, count: int) -> Iterator[Try]:
    """So many folders of the sessions in turn, drawn at random."""
    drawn = random.Random(seed)
    whole = [_saved(folder / str(number), *session) for number, session in enumerate(_SESSIONS)]
    for number in range(count):
        (family, _), (source, logits) = _SESSIONS[number % len(whole)], whole[number % len(whole)]
        told, spoil, same = drawn.choice((_flip, _facts, _facts, _file))(source, drawn)
        call = partial(_go_on, family, source, folder / "spoiled", spoil, logits if same else None)
        yield Try(f"{family} {_SESSIONS[number % len(whole)][1]}: {told}", call)


Spoiling = tuple[str, Callable[[Path], object], bool]  # in words, what does it, and whether answers must stay the same


def _saved(folder: Path, family: str, settings: dict[str, Any]) -> tuple[Path, torch.Tensor]:
    with shared_engine(family).open(**settings) as session:
        session.push(some_frames(7))  # of families that take two at once, one is left waiting
        session.save(folder)
        return folder, session.logits("What?")


def _go_on(
    family: str, source: Path, target: Path, spoil: Callable[[Path], object], logits: torch.Tensor | None
) -> None:
    """Restore a copy of the folder with a fault in it, ask, look at more and save it again."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    spoil(target)
    with shared_engine(family).restore(target) as session:
        found = session.logits("What?")
        if logits is not None and not torch.equal(found, logits):
            raise WrongAnswerError("it answers something else")
        session.push(some_frames(9)[7:])
        session.save(target)


def _flip(source: Path, drawn: random.Random) -> Spoiling:
    """A bit of any file."""
    path = drawn.choice(sorted(source.iterdir()))
    data = bytearray(path.read_bytes())
    place = drawn.randrange(len(data) * 8)
    data[place // 8] ^= 1 << place % 8
    return f"{path.name} bit {place} flipped", lambda target: (target / path.name).write_bytes(data), True


def _file(source: Path, drawn: random.Random) -> Spoiling:
    """A file is cut, gone, a folder, or another one."""
    name, other = (path.name for path in drawn.sample(sorted(source.iterdir()), 2))
    data = (source / name).read_bytes()
    ways: dict[str, Callable[[Path], object]] = {
        "cut": lambda target: (target / name).write_bytes(data[: len(data) // 2]),
        "empty": lambda target: (target / name).write_bytes(b""),
        "gone": lambda target: (target / name).unlink(),
        "a folder": lambda target: instead(target / name),
        f"a copy of {other}": lambda target: (target / name).write_bytes((source / other).read_bytes()),
    }
    told = drawn.choice(sorted(ways))
    return f"{name} {told}", ways[told], True


def _facts(source: Path, drawn: random.Random) -> Spoiling:
    """A fact of another kind, signed as if it had been written so."""
    values = json.loads((source / FACTS).read_text(encoding="utf-8"))
    place, value = drawn.choice([each for each in places(values) if each != ("check",)]), drawn.choice([*ODD, GONE])

    def spoil(target: Path) -> None:
        spoiled = changed(values, place, value)
        said = {name: fact for name, fact in spoiled.items() if name not in ("format", "check")}
        spoiled["check"] = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
        (target / FACTS).write_text(json.dumps(spoiled), encoding="utf-8")

    return f"{'.'.join(map(str, place))} {'gone' if value is GONE else f'= {value!r}'}", spoil, False
