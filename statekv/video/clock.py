"""Times that a stream does not give plainly."""

from __future__ import annotations

import re


class Clock:
    """Turns the stamps of one stream into times that never run backwards.

    A missing stamp, or one before the previous frame, becomes the previous frame's end: raw H.264 carries no
    stamps at all, and a stream that was cut and joined starts again at zero.

    Args:
        start_seconds: the time of a first frame without a stamp.
        frame_seconds: the usual length of a frame, for those that do not say; 0 where unknown.
    """

    def __init__(self, start_seconds: float, frame_seconds: float) -> None:
        self.end_seconds = start_seconds
        self._frame_seconds = frame_seconds
        self._last_pts: float | None = None

    @property
    def started(self) -> bool:
        """True once a frame has been seen."""
        return self._last_pts is not None

    def tick(self, pts_seconds: float | None, duration_seconds: float | None) -> tuple[float, float]:
        """Return (pts, duration) in seconds of the next frame, given what its stream says."""
        duration = duration_seconds or self._frame_seconds
        backwards = pts_seconds is not None and self._last_pts is not None and pts_seconds < self._last_pts
        pts = self.end_seconds if pts_seconds is None or backwards else pts_seconds
        self._last_pts = pts
        self.end_seconds = pts + duration
        return pts, duration


def parse_timestamp(text: str) -> float | None:
    """Return the seconds of "HH:MM:SS.fraction", or None for any other text."""
    match = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", text)
    return int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3]) if match else None
