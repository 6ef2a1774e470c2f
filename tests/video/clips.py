"""Small clips for the tests, written with PyAV."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

REAL = Path(os.environ.get("STATEKV_CLIPS", ""))
needs_real = pytest.mark.skipif(not os.environ.get("STATEKV_CLIPS"), reason="STATEKV_CLIPS names no folder")

SIZE = (64, 48)


def level(index: int) -> int:
    """The grey of the picture with this index: 37 of them, further apart than coding noise."""
    return 16 + 6 * (index * 11 % 37)


def grey(index: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.full((size[1], size[0], 3), level(index), np.uint8)


def quarters() -> np.ndarray:
    """Red, green / blue, white: tells every turn and mirroring apart. [H, W, 3]"""
    picture = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
    middle_y, middle_x = SIZE[1] // 2, SIZE[0] // 2
    picture[:middle_y, :middle_x] = (255, 0, 0)
    picture[:middle_y, middle_x:] = (0, 255, 0)
    picture[middle_y:, :middle_x] = (0, 0, 255)
    picture[middle_y:, middle_x:] = (255, 255, 255)
    return picture


def noise(count: int) -> Iterator[np.ndarray]:
    """Pictures that do not compress, so that a cut in the file's middle is one in the video's. [H, W, 3]"""
    generator = np.random.default_rng(0)
    for _ in range(count):
        yield generator.integers(0, 255, (SIZE[1], SIZE[0], 3), dtype=np.uint8)


def write_clip(
    path: Path,
    ticks: Sequence[int],
    time_base: Fraction = Fraction(1, 25),
    *,
    pictures: Sequence[np.ndarray] | None = None,
    codec: str = "libx264",
    format: str | None = None,
    pix_fmt: str = "yuv420p",
    muxer: dict[str, str] | None = None,
    options: dict[str, str] | None = None,
    sound_seconds: float = 0,
) -> Path:
    """One video stream whose frames are stamped `ticks`, grey unless `pictures` are given."""
    with av.open(str(path), "w", format=format, options=muxer or {}) as container:
        stream: Any = container.add_stream(codec, rate=25, options={"threads": "1", **(options or {})})
        stream.width, stream.height, stream.pix_fmt = (*SIZE, pix_fmt)
        stream.time_base = stream.codec_context.time_base = time_base
        sound: Any = container.add_stream("aac", rate=8000) if sound_seconds else None
        for index, tick in enumerate(ticks):
            pixels = grey(index) if pictures is None else pictures[index]
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = tick, time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            mux_silence(container, sound, sound_seconds)
    return path


def mux_silence(container: Any, stream: Any, seconds: float) -> None:
    for start in range(0, int(seconds * 8000), 1024):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 8000, start, Fraction(1, 8000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def write_sound(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        mux_silence(container, container.add_stream("aac", rate=8000), 0.5)
    return path


def write_two_streams(path: Path) -> Path:
    """Stream 0 is red, 10 frames; stream 1 is blue and larger, 20 frames."""
    plan = [((255, 0, 0), (32, 32), 10), ((0, 0, 255), (64, 64), 20)]
    with av.open(str(path), "w") as container:
        streams: list[Any] = [container.add_stream("libx264", rate=10) for _ in plan]
        for stream, (_, size, _) in zip(streams, plan, strict=True):
            stream.width, stream.height, stream.pix_fmt = (*size, "yuv420p")
        for stream, (colour, size, count) in zip(streams, plan, strict=True):
            for _ in range(count):
                pixels = np.full((size[1], size[0], 3), colour, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode(None))
    return path


def set_matrix(path: Path, a: int, b: int, c: int, d: int) -> Path:
    """Write a display matrix into the track header of an MP4, as cameras do."""
    data = bytearray(path.read_bytes())
    matrix = data.find(b"tkhd") + 4 + 40
    one = 1 << 16
    data[matrix : matrix + 36] = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def cut_start(path: Path, ticks: int) -> Path:
    """Move the start in the edit list of an MP4 forward, as trimming without re-encoding does."""
    data = bytearray(path.read_bytes())
    entry = data.find(b"elst") + 4 + 8
    start = struct.unpack(">i", data[entry + 4 : entry + 8])[0]
    data[entry + 4 : entry + 8] = struct.pack(">i", start + ticks)
    path.write_bytes(data)
    return path


def closest_index(data: torch.Tensor, count: int) -> int:
    """Which of the first `count` grey pictures this is. data: [3, H, W]"""
    mean = data.float().mean().item()
    return min(range(count), key=lambda index: abs(level(index) - mean))
