"""Turns pixels upright, as the display matrix of a phone's recording asks."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

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
