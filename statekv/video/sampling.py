"""Which frames to keep: by time alone, so that a file and a live stream agree, or by what a gate sees in them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from statekv.errors import ConfigError
from statekv.video.frame import Frame

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


@dataclass(frozen=True, slots=True)
class FrameSampler:
    """Which frames of a video are seen.

    Attributes:
        fps: frames per second at most; None keeps every frame.
        max_frames: frames at most, spread over a video of known length; None: no limit.
        uniform: spread max_frames over the whole video, and refuse one of unknown length.
        newest: frames that a question sees, the newest ones of those kept; None: all.

    Raises:
        ConfigError: a limit that is not positive.
    """

    fps: float | None = None
    max_frames: int | None = None
    uniform: bool = False
    newest: int | None = None

    def __post_init__(self) -> None:
        check_limits(self.fps, self.max_frames)
        if self.newest is not None and self.newest < 1:
            raise ConfigError(f"newest is {self.newest}, must be at least 1", "leave it out to see all frames")

    @property
    def chooses(self) -> bool:
        """Whether what is seen depends on where the video ends."""
        return self.uniform or self.newest is not None

    def begin(self, start_seconds: float = 0.0, duration_seconds: float | None = None) -> Sampler:
        """Sample one video: its first frame's time, and its length; None where that is unknown.

        Raises:
            ConfigError: `uniform` without a length, or a length that is not positive.
        """
        self.check_length(duration_seconds)
        return Sampler(self.fps, self.max_frames, start_seconds, duration_seconds)

    def check_length(self, duration_seconds: float | None) -> None:
        """Raise ConfigError if a video of this length, None where it is unknown, cannot be sampled so."""
        if self.uniform and duration_seconds is None:
            rule = "uniform spreads its frames over the whole video, but the length of this source is unknown"
            raise ConfigError(rule, "use a file, or another method, such as last_frames")

    def together(self, frames: int) -> int:
        """Of so many frames that are kept, how many are seen together."""
        return frames if self.newest is None else min(frames, self.newest)


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
            rule = f"duration_seconds is {duration_seconds}, must be a positive number"
            raise ConfigError(rule, "leave it out where it is unknown")
        self.max_frames = max_frames
        spread = None if max_frames is None or duration_seconds is None else max_frames / duration_seconds
        self.rate = fps if spread is None else min(fps or math.inf, spread)
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


def _cell(elapsed_seconds: float, rate: float) -> int:
    return math.floor(elapsed_seconds * rate + min(_SLACK_SECONDS * rate, _SLACK_CELLS))


class FrameGate(ABC):
    """Says by its pixels whether a frame is worth encoding, before the vision tower sees it.

    A gate keeps nothing itself, for one serves many streams: what it wants to know at the next frame it puts into the
    memory, which belongs to the stream. Its parameters are attributes of their own names, as in a frozen dataclass, so
    that a saved session can name it.
    """

    @abstractmethod
    def admit(self, frame: Frame, memory: dict[str, Any]) -> bool:
        """Whether the frame goes on; otherwise it is as if it had never been.

        Args:
            frame: the stream's next sampled one, in the order of their times; not to be changed.
            memory: what this gate has left there at the frame before, at first nothing: tensors, and what JSON holds,
                by name. A copy; what is in it afterwards is there at the next frame. Forks and saves are none of its
                concern.
        """
