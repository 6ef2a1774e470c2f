"""One picture with its time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from statekv.errors import VideoError


# Compared by identity: comparing two pictures has no single truth value.
@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One picture of a video.

    Attributes:
        data: pixels, [3, H, W] uint8, RGB, upright.
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
        shape = list(self.data.shape)
        if len(shape) != 3 or shape[0] != 3 or 0 in shape:
            raise VideoError(f"frame data has shape {shape}, must be [3, H, W]", _channel_hint(shape))
        if self.data.dtype != torch.uint8:
            raise VideoError(f"frame data is {self.data.dtype}, must be torch.uint8", "scale to 0..255, cast")
        if not math.isfinite(self.pts_seconds):
            raise VideoError(f"pts_seconds is {self.pts_seconds}, must be finite", "give the frame a time")
        for name in ("duration_seconds", "gap_seconds"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise VideoError(f"{name} is {value}, must be finite and not negative", "use 0 where it is unknown")


def _channel_hint(shape: list[int]) -> str:
    if len(shape) == 3 and shape[2] == 3:
        return "put the channels first: data.permute(2, 0, 1)"
    if len(shape) == 4:
        return "hand over one frame at a time"
    return "convert to RGB, channels first"
