"""Writes frames as an H.264 MP4 that plays anywhere."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import torch
from av.codec import Codec
from av.codec.codec import UnknownCodecError
from av.container import OutputContainer
from av.error import FFmpegError

from statekv.errors import ConfigError, VideoError

Picture = npt.NDArray[np.uint8] | torch.Tensor


def write_video(
    path: str | os.PathLike[str],
    frames: Iterable[Picture],
    fps: float | Fraction,
    crf: int = 18,
    codec: str = "libx264",
) -> None:
    """Encode frames one by one into an MP4 (yuv420p, index first), which appears at `path` once whole.

    Args:
        frames: pictures [3, H, W] uint8 RGB, all of one even height and width; at least one.
        crf: quality from 0 (lossless) to 51 (worst).
        codec: FFmpeg's name of the encoder.

    Raises:
        ConfigError: fps, crf, or the shape or dtype of a frame.
        VideoError: no frames, no such encoder, or the file cannot be written.
    """
    if not (math.isfinite(fps) and fps > 0):
        raise ConfigError(f"fps is {fps}, must be a positive number", "for example 25")
    if not 0 <= crf <= 51:
        raise ConfigError(f"crf is {crf}, must be from 0 to 51", "18 looks lossless to the eye")
    _check_encoder(codec)
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with av.open(str(partial), mode="w", format="mp4", options={"movflags": "+faststart"}) as container:
            _encode(container, frames, Fraction(fps).limit_denominator(100_000), crf, codec)
        os.replace(partial, target)
    except (OSError, FFmpegError) as error:
        rule = f"{target.name} cannot be written: {(error.strerror or 'unknown reason').lower()}"
        raise VideoError(rule, "check the folder and the free space") from None
    finally:
        partial.unlink(missing_ok=True)


def _encode(container: OutputContainer, frames: Iterable[Picture], fps: Fraction, crf: int, codec: str) -> None:
    source = (_channels_last(frame) for frame in frames)
    first = next(source, None)
    if first is None:
        raise VideoError("there are no frames to write", "hand over at least one")
    height, width, _ = first.shape
    if height % 2 or width % 2:
        raise ConfigError(f"frames are {width}x{height}, must be even for H.264", "crop or pad by a pixel")
    stream: Any = container.add_stream(codec, rate=fps, options={"crf": str(crf)})
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    for index, pixels in enumerate(chain([first], source)):
        if pixels.shape != first.shape:
            rule = f"frame {index} is {pixels.shape[1]}x{pixels.shape[0]}, but the first is {width}x{height}"
            raise ConfigError(rule, "resize them to one size")
        picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        picture.pts, picture.time_base = index, 1 / fps
        container.mux(stream.encode(picture))
    container.mux(stream.encode(None))


def _channels_last(frame: Picture) -> npt.NDArray[Any]:
    pixels = frame.detach().cpu().numpy() if isinstance(frame, torch.Tensor) else frame
    if pixels.ndim != 3 or pixels.shape[0] != 3 or pixels.dtype != np.uint8:
        rule = f"a frame is {pixels.dtype} of shape {list(pixels.shape)}, must be uint8 [3, H, W]"
        raise ConfigError(rule, "put the channels first and scale to 0..255")
    return np.ascontiguousarray(pixels.transpose(1, 2, 0))


def _check_encoder(codec: str) -> None:
    try:
        Codec(codec, "w")
    except UnknownCodecError:
        raise VideoError(f"PyAV has no encoder {codec}", "install av from PyPI, it has libx264") from None
