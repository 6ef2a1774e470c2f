"""Calls of the library with one thing wrong."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import statekv
from statekv.config import SETTINGS
from tests.talk import shared_engine, some_frames
from tests.wrong_inputs.trying import Try

ODD: list[Any] = [
    *(None, 3, -1, 1.5, float("nan"), float("inf"), 10**30, True, "", "x", b"x", [], {}, ("a",)),
    *(object(), torch.zeros(2), np.zeros(2)),
]
PATHS = [
    *("a\0b.mp4", "x" * 300 + ".mp4", "\udcff.mp4", "", " ", ".", "..", "/", "C:\\x.mp4", "~", "-x", "nothing:"),
    *("http://[::1/x", "file://", "http://", "rtsp://", "http:///x", "http://a:b:c/x", "file:///a\0b"),
    *("/dev/video999", "/dev/null", "http://127.0.0.1:99999/x.mp4", "http://\udcff/x"),
]
QUESTIONS = ["\udcff", "a\0b", "x" * 20_000, "\u202e", "{{ 1/0 }}", "{% raw %}", " ", "<|im_end|>"]
ANSWERING = (
    *("max_new_tokens", "stop", "seed", "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "max_time"),
    *("repetition_penalty", "eos_token_id", "bad_words_ids", "stop_strings", "suppress_tokens"),
)
PICTURE = torch.zeros(3, 4, 4, dtype=torch.uint8)


def tries(folder: Path, seed: int, count: int) -> Iterator[Try]:
    """So many of them, drawn at random; saves go to the folder."""
    yield from random.Random(seed).sample(everything := list(_all(folder)), min(count, len(everything)))


def _all(folder: Path) -> Iterator[Try]:
    engine = shared_engine("internvl")
    session = engine.open()
    session.push(some_frames(4))
    session.save(folder / "saved")

    def answer(name: str, value: Any) -> object:
        drawing = {"do_sample": True} if name in ("temperature", "top_k", "top_p", "min_p", "typical_p", "seed") else {}
        return session.ask("What?", **{"max_new_tokens": 1, **drawing, name: value})

    for path in PATHS:
        yield Try(f"open a path {path!r}", lambda path=path: engine.open(path))  # type: ignore[misc]
        yield Try(f"restore a path {path!r}", lambda path=path: engine.restore(path))  # type: ignore[misc]
        yield Try(f"load a path {path!r}", lambda path=path: statekv.load(path))  # type: ignore[misc]
        yield Try(f"save to a path {path!r}", lambda path=path: session.save(f"{folder}/{path}"))  # type: ignore[misc]
    for question in QUESTIONS:
        yield Try(f"ask {question!r}", lambda text=question: session.ask(text, max_new_tokens=1))  # type: ignore[misc]
    doors: dict[str, Callable[[Any], object]] = {
        "open": engine.open,
        "open with a method": lambda value: engine.open(None, value),
        "open a stream": lambda value: engine.open(folder / "no.mp4", stream=value),
        "push": session.push,
        "push a frame": lambda value: session.push([value]),
        "ask": session.ask,
        "logits": session.logits,
        "restore": engine.restore,
        "restore a source": lambda value: engine.restore(folder / "saved", value),
        "save": lambda value: session.save(value) if not isinstance(value, str) else None,
        "watch_all": engine.watch_all,
        "load": statekv.load,
        "load a dtype": lambda value: statekv.load("demo", dtype=value),
        "load on a device": lambda value: statekv.load("demo", device=value),
        "generate": statekv.generate,
        "generate from ids": lambda value: statekv.generate(engine.model.model, input_ids=value),
        "frame": lambda value: statekv.Frame(value, 0.0),
        "frame at a time": lambda value: statekv.Frame(PICTURE, value),
        "frame for a time": lambda value: statekv.Frame(PICTURE, 0.0, value),
    }
    for value, (kind, door) in itertools.product(ODD, doors.items()):
        yield Try(f"{kind} {value!r}", lambda door=door, value=value: door(value))  # type: ignore[misc]
    for value, name in itertools.product(ODD, ANSWERING):
        yield Try(f"ask, {name}={value!r}", lambda name=name, value=value: answer(name, value))  # type: ignore[misc]
    for value, name in itertools.product(ODD, SETTINGS):
        yield Try(f"setting {name}={value!r}", lambda name=name, value=value: statekv.Config(**{name: value}))  # type: ignore[misc]
