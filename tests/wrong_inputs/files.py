"""Video files that are damaged, cut, put together from two, or something else than their name says."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from statekv.errors import VideoWarning
from tests.talk import shared_engine
from tests.video.fixtures.clips import noise, write_clip
from tests.wrong_inputs.trying import Try, WrongAnswerError

FRAMES = 20  # of each clip
_CLIPS: dict[str, dict[str, Any]] = {
    "clip.mp4": {},
    "clip.mkv": {},
    "clip.avi": {"codec": "mpeg4"},
    "clip.ts": {},
    "clip.webm": {"codec": "libvpx"},
    "clip.gif": {"codec": "gif", "pix_fmt": "rgb8"},
    "clip.mov": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
}
_OTHERS = (
    *(b"", b"\0", b"\0" * 100_000, b"x" * 1000, b"\xff\xd8\xff", b"GIF89a", b"\x89PNG\r\n\x1a\n" + b"\0" * 50, b"RIFF"),
    *(
        b"\0\0\0\x20ftypisom",
        b"\x1aE\xdf\xa3",
        b"<html></html>",
        b"%PDF-1.7",
        b"PK\x03\x04",
        b"\x7fELF",
        b"#!/bin/sh\n",
    ),
)
_NAMES = (
    "x.mp4",
    "x.mkv",
    "x.avi",
    "x.ts",
    "x.gif",
    "x.txt",
    "x.jpg",
    "x.png",
    "x.mp3",
    "x.yuv",
    "x.h264",
    "x",
    ".mp4",
)


def tries(folder: Path, seed: int, count: int) -> Iterator[Try]:
    """So many files, drawn at random."""
    drawn = random.Random(seed)
    pictures = list(noise(FRAMES))
    made = (
        write_clip(folder / name, range(0, 12 * FRAMES, 12), pictures=pictures, **how) for name, how in _CLIPS.items()
    )
    clips = {path.name: path.read_bytes() for path in made}
    for _ in range(count):
        told, data, name, whole = drawn.choice((_flipped, _cut, _spliced, _blank, _renamed, _other))(clips, drawn)
        yield Try(f"{told} as {name}", partial(look, folder / f"spoiled{name}", data, whole))


def look(path: Path, data: bytes, whole: bool) -> None:
    """Watch a file and ask about it.

    Args:
        whole: whether what is missing must be told, but for a second at the end, which headers may be wrong by.
    """
    path.write_bytes(data)
    with warnings.catch_warnings(record=True) as heard, shared_engine("internvl").open(path, fps=25.0) as session:
        warnings.simplefilter("always")
        session.watch()
        session.ask("What?", max_new_tokens=1)
        times = [span.pts_seconds or 0.0 for span in session.state.spans if span.kind == "step"]
    if whole and session.frames < FRAMES - 3 and not any(issubclass(each.category, VideoWarning) for each in heard):
        raise WrongAnswerError(f"{session.frames} frames, and no word")
    if times != sorted(times):
        raise WrongAnswerError(f"times run backwards: {times}")


Made = tuple[str, bytes, str, bool]
Making = Callable[[dict[str, bytes], random.Random], Made]


def _flipped(clips: dict[str, bytes], drawn: random.Random) -> Made:
    name, count = drawn.choice(list(clips)), drawn.choice((1, 3, 30))
    data = bytearray(clips[name])
    reach = drawn.choice((200, len(data)))  # of what describes the file, or of all
    for _ in range(count):
        data[drawn.randrange(min(reach, len(data)))] ^= 1 << drawn.randrange(8)
    return f"{count} bits flipped within {reach} bytes", bytes(data), name, False


def _cut(clips: dict[str, bytes], drawn: random.Random) -> Made:
    name = drawn.choice(list(clips))
    data = clips[name]
    stop = drawn.randrange(len(data) * 9 // 10)
    return f"{len(data)} bytes cut to {stop}", data[:stop], name, name not in ("clip.ts", "clip.gif")  # have no length


def _spliced(clips: dict[str, bytes], drawn: random.Random) -> Made:
    names = drawn.sample(list(clips), 2)
    one, other = (clips[name] for name in names)
    place = drawn.randrange(len(one))
    return f"{place} bytes of {names[0]}, then {names[1]}", one[:place] + other[place:], drawn.choice(names), False


def _blank(clips: dict[str, bytes], drawn: random.Random) -> Made:
    name = drawn.choice(list(clips))
    data = clips[name]
    first, stop = sorted(drawn.sample(range(len(data)), 2))
    fill = drawn.choice((b"\0", b"\xff"))
    return f"bytes {first} to {stop} are {fill!r}", data[:first] + fill * (stop - first) + data[stop:], name, False


def _renamed(clips: dict[str, bytes], drawn: random.Random) -> Made:
    name = drawn.choice(list(clips))
    return name, clips[name], drawn.choice(_NAMES), False


def _other(clips: dict[str, bytes], drawn: random.Random) -> Made:
    data = drawn.choice((*_OTHERS, drawn.randbytes(5000)))
    return f"{data[:20]!r}, {len(data)} bytes", data, drawn.choice((*_NAMES, *clips)), False
