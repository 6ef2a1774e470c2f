"""Times that a stream does not give plainly."""

from __future__ import annotations

import re

# A stamp further ahead of its predecessor than this, and than the time since, is another clock's.
_JUMP_SECONDS = 10.0


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


class LiveClock:
    """Times of a live stream: seconds since its first frame, by its own stamps, over any number of connections.

    Each connection's first stamp is set against the wall clock, for stamps start anywhere. A stream that jumps, back or
    far ahead of the wall, is set against it again. Without stamps a frame's time is when it came. Never runs backwards.
    """

    def __init__(self) -> None:
        self.began_seconds: float | None = None  # wall clock
        self.last_seconds: float | None = None  # stream time of the newest frame
        self._offset: float | None = None
        self._last_pts = self._last_now = 0.0

    def go_on(self, last_seconds: float, elapsed_seconds: float, now_seconds: float) -> None:
        """The stream began elsewhere, where another wall clock counted: so long ago, its newest frame at this time.
        Where less has gone by than that, a clock was set back.
        """
        self.began_seconds = now_seconds - max(elapsed_seconds, last_seconds)
        self.last_seconds = last_seconds

    def reconnect(self) -> None:
        """A new connection begins, whose stamps have nothing to do with the former ones."""
        self._offset = None

    def tick(self, pts_seconds: float | None, now_seconds: float) -> float:
        """The next frame's time, by its stamp (None: it has none that means anything) and by the wall clock."""
        if self.began_seconds is None:
            self.began_seconds = now_seconds
        elapsed = now_seconds - self.began_seconds
        if pts_seconds is None:
            found = elapsed
        else:
            if self._offset is None or self._jumped(pts_seconds, now_seconds):
                self._offset = max(elapsed, self.last_seconds or 0.0) - pts_seconds
            found = pts_seconds + self._offset
            self._last_pts, self._last_now = pts_seconds, now_seconds
        self.last_seconds = max(found, self.last_seconds or 0.0)
        return self.last_seconds

    def _jumped(self, pts_seconds: float, now_seconds: float) -> bool:
        advance = pts_seconds - self._last_pts
        return advance < 0 or advance > now_seconds - self._last_now + _JUMP_SECONDS


def parse_timestamp(text: str) -> float | None:
    """Return the seconds of "HH:MM:SS.fraction", or None for any other text."""
    match = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", text)
    return int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3]) if match else None
