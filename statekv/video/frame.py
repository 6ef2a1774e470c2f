"""One picture with its time."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from statekv.errors import VideoError, kind_of


# Compared by identity: comparing two pictures has no single truth value.
@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One picture of a video.

    Attributes:
        data: pixels, [3, H, W] uint8, RGB, upright; a numpy array is taken over as a tensor on the same memory.
        pts_seconds: presentation time on the stream's own clock, which need not start at zero.
        duration_seconds: how long the picture is shown; 0 where unknown.
        gap_seconds: time right before it from which a live source showed nothing, because it was away.

    Raises:
        VideoError: a wrong shape or dtype, or a time that is not a finite number.
    """

    data: torch.Tensor
    pts_seconds: float
    duration_seconds: float = 0.0
    gap_seconds: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.data, np.ndarray):
            object.__setattr__(self, "data", _tensor(self.data))
        if not isinstance(self.data, torch.Tensor):
            told = f"frame data is {kind_of(self.data)}, must be a tensor or a numpy array"
            raise VideoError(told, "give pixels [3, H, W] uint8")
        shape = list(self.data.shape)
        if len(shape) != 3 or shape[0] != 3 or 0 in shape:
            raise VideoError(f"frame data has shape {shape}, must be [3, H, W]", _channel_hint(shape))
        if self.data.dtype != torch.uint8:
            raise VideoError(f"frame data is {self.data.dtype}, must be torch.uint8", "scale to 0..255, cast")
        for name in ("pts_seconds", "duration_seconds", "gap_seconds"):
            if not isinstance(value := getattr(self, name), Real):
                raise VideoError(f"{name} is {value!r}, must be a number of seconds", "give the frame a time")
        if not math.isfinite(self.pts_seconds):
            raise VideoError(f"pts_seconds is {self.pts_seconds}, must be finite", "give the frame a time")
        for name in ("duration_seconds", "gap_seconds"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise VideoError(f"{name} is {value}, must be finite and not negative", "use 0 where it is unknown")

    def __repr__(self) -> str:  # without the pixels
        told = [f"{self.data.shape[2]}x{self.data.shape[1]}", f"pts_seconds={self.pts_seconds}"]
        told += [f"gap_seconds={self.gap_seconds}"] if self.gap_seconds else []
        return f"Frame({', '.join(told)})"


def _tensor(pixels: npt.NDArray[Any]) -> torch.Tensor:
    try:
        return torch.from_numpy(np.ascontiguousarray(pixels))
    except TypeError:
        raise VideoError(f"frame data is {pixels.dtype}, must be uint8", "scale to 0..255, cast") from None


def _channel_hint(shape: list[int]) -> str:
    if len(shape) == 3 and shape[2] == 3:
        return "put the channels first: data.permute(2, 0, 1)"
    if len(shape) == 4:
        return "hand over one frame at a time"
    return "convert to RGB, channels first"


Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Orientation:
    """How stored pixels become upright ones.

    Attributes:
        mirrored: stored upside down as in a mirror; undone before the turn.
        rotation_degrees: counterclockwise turn to apply: 0, 90, 180 or 270.
    """

    mirrored: bool = False
    rotation_degrees: int = 0

    @classmethod
    def from_matrix(cls, matrix: Any) -> Orientation:
        """Read FFmpeg's display matrix, a buffer of nine native 32-bit integers; None means upright."""
        if matrix is None:
            return cls()
        a, b, _, c, d, *_ = struct.unpack("9i", bytes(matrix))
        # The matrix maps (x, y) to (ax + cy, bx + dy) with y pointing down, hence the sign of the angle.
        quarter_turns = round(-math.atan2(b, a) / (math.pi / 2)) % 4
        return cls(mirrored=a * d - b * c < 0, rotation_degrees=90 * quarter_turns)

    def upright(self, pixels: Pixels) -> Pixels:
        """Return a view [H', W', 3] of stored pixels [H, W, 3], turned upright."""
        flipped = pixels[::-1] if self.mirrored else pixels
        return np.rot90(flipped, self.rotation_degrees // 90)
