"""How a live source is doing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LiveStatus:
    """A live source at one moment.

    Attributes:
        connected: whether it is there.
        lag_seconds: how long ago the frame that was handed out last was due.
        dropped: sampled frames that were never handed out, because the reader was slower.
        gaps: how often it went away and came back.
        gap_seconds: stream time that was lost in them, in all.
    """

    connected: bool
    lag_seconds: float
    dropped: int
    gaps: int
    gap_seconds: float
