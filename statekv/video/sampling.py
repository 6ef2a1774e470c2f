"""Which frames to keep, decided by time alone, so that a file and a live stream agree."""

from __future__ import annotations

import math
from collections.abc import Iterable

from statekv.errors import ConfigError

# Containers round times (Matroska to whole milliseconds): a frame this close before a cell's border belongs
# to the cell. Never more than a tenth of a cell, or a high rate would merge neighbours.
_SLACK_SECONDS = 1e-3
_SLACK_CELLS = 0.1


def check_limits(fps: float | None, max_frames: int | None) -> None:
    """Raise ConfigError unless both limits are absent or positive."""
    if fps is not None and not (math.isfinite(fps) and fps > 0):
        raise ConfigError(f"fps is {fps}, must be a positive number", "leave it out to keep every frame")
    if max_frames is not None and max_frames < 1:
        raise ConfigError(f"max_frames is {max_frames}, must be at least 1", "leave it out for no limit")


class Sampler:
    """Keeps the first frame of each time cell of `1 / rate` seconds, counted from the stream's start.

    The rate is `fps`, lowered to `max_frames / duration_seconds` where both are known. Without a duration the
    first `max_frames` frames at `fps` are kept. Never more than `max_frames`, even if the duration was wrong.

    Args:
        fps: frames per second to keep at most; None keeps every frame.
        max_frames: frames to keep in all; None for no limit.
        start_seconds: the time at which the first cell begins.
        duration_seconds: length of the whole video; None for a live stream.

    Raises:
        ConfigError: a limit that is not positive.
    """

    def __init__(
        self,
        fps: float | None = None,
        max_frames: int | None = None,
        start_seconds: float = 0.0,
        duration_seconds: float | None = None,
    ) -> None:
        check_limits(fps, max_frames)
        if duration_seconds is not None and not (math.isfinite(duration_seconds) and duration_seconds > 0):
            raise ConfigError(
                f"duration_seconds is {duration_seconds}, must be a positive number",
                "leave it out where it is unknown",
            )
        self.max_frames = max_frames
        self.rate = _rate(fps, max_frames, duration_seconds)
        self.start_seconds = start_seconds
        self.kept = 0
        self._last_cell: int | None = None

    @property
    def exhausted(self) -> bool:
        """True once no later frame can be kept: reading on is wasted work."""
        return self.max_frames is not None and self.kept >= self.max_frames

    def keep(self, pts_seconds: float) -> bool:
        """Say whether the frame at this time is kept; call once per frame, in presentation order."""
        if self.exhausted:
            return False
        if self.rate is not None:
            cell = _cell(pts_seconds - self.start_seconds, self.rate)
            if self._last_cell is not None and cell <= self._last_cell:
                return False
            self._last_cell = cell
        self.kept += 1
        return True


def count_kept(sampler: Sampler, pts_seconds: Iterable[float]) -> int:
    """Count the frames that a fresh sampler will keep of these times, given in any order.

    Packets come in decode order, so the times need not be sorted. The sampler is left as it was.
    """
    if sampler.rate is None:
        found = sum(1 for _ in pts_seconds)
    else:
        found = len({_cell(pts - sampler.start_seconds, sampler.rate) for pts in pts_seconds})
    return found if sampler.max_frames is None else min(found, sampler.max_frames)


def _rate(fps: float | None, max_frames: int | None, duration_seconds: float | None) -> float | None:
    if max_frames is None or duration_seconds is None:
        return fps
    return min(fps or math.inf, max_frames / duration_seconds)


def _cell(elapsed_seconds: float, rate: float) -> int:
    return math.floor(elapsed_seconds * rate + min(_SLACK_SECONDS * rate, _SLACK_CELLS))
