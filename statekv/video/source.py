"""What a stream draws its frames from: the contract, and the two sources that open nothing."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from statekv.errors import ConfigError, kind_of
from statekv.video.frame import Frame, Pixels
from statekv.video.sampling import FrameSampler, Sampler

_log = logging.getLogger(__name__)


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


@runtime_checkable
class Source(Iterator[Frame], Protocol):
    """Frames in the order of their times, and what a session has to know of where they come from.

    One thread at a time draws frames; all else may be asked from any. What is said here holds for frames that wait for
    their reader and that nobody can read again; a source of another kind says otherwise.
    """

    @property
    def live(self) -> bool:
        """Whether it goes on without its reader, as a camera does; a file waits.

        A live source is drawn frame by frame, for a batch would keep its first frames waiting for its last, and a draw
        that takes long may be interrupted. Others are never interrupted inside a frame: a generator could not go on.
        """
        return False

    @property
    def status(self) -> LiveStatus | None:
        """How it is doing now; None for a source that waits."""
        return None

    def ready(self, timeout_seconds: float) -> bool:
        """Wait until the next frame, or the end, is there; False if it is not by then."""
        return True

    def facts(self) -> dict[str, Any] | None:
        """What a save notes so that reading can go on another day, as JSON; None: nobody can go on."""
        return None

    def fork(self) -> Source | None:
        """The same frames from here on, read separately; None: they can be read once."""
        return None

    def close(self) -> None:
        """Stop reading; may be called twice."""
        return


class IteratorSource(Source):
    """Frames of any iterable, which closes with this source where it can be closed.

    Pixels are copied: frames are read before their turn, and the iterable may write the next one over the last.
    """

    def __init__(self, frames: Iterable[Frame]) -> None:
        self._frames = iter(frames)

    def __next__(self) -> Frame:
        frame = next(self._frames)
        return replace(frame, data=frame.data.clone()) if isinstance(frame, Frame) else frame

    def close(self) -> None:
        close = getattr(self._frames, "close", None)
        if close is not None:
            close()


def as_source(frames: Iterable[Frame]) -> Source:
    """Return frames as a source: themselves where they are one.

    Raises:
        ConfigError: no frames can be drawn from it.
    """
    if isinstance(frames, Source):
        return frames
    if not isinstance(frames, Iterable):
        rule = f"frames cannot be drawn from {kind_of(frames)}"
        raise ConfigError(rule, "give an iterator of statekv.Frame, or a source of statekv.video")
    return IteratorSource(frames)


@dataclass(frozen=True, slots=True)
class _Waiting:
    frame: Frame
    due: float
    came: float


class FrameBuffer:
    """A bounded queue that drops by age; for one thread that puts and one that gets.

    Args:
        depth: frames that wait at most.
        max_age_seconds: how long a frame waits before a newer one pushes it out.

    Attributes:
        dropped: frames that nobody got.
    """

    def __init__(self, depth: int, max_age_seconds: float) -> None:
        self.dropped = 0
        self._depth = depth
        self._max_age_seconds = max_age_seconds
        self._frames: deque[_Waiting] = deque()
        self._ended = False
        self._error: Exception | None = None
        self._changed = threading.Condition()

    def put(self, frame: Frame, due: float) -> None:
        """Add a frame that was due at this moment of `time.monotonic`; never waits."""
        with self._changed:
            self._frames.append(_Waiting(frame, due, time.monotonic()))
            self._drop()
            self._changed.notify_all()

    def end(self, error: Exception | None = None) -> None:
        """No frame follows; an error is raised behind those that wait."""
        with self._changed:
            self._ended = True
            self._error = error
            self._changed.notify_all()

    def ready(self, timeout_seconds: float) -> bool:
        """Wait until `get` has something to say; False if it has not by then."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._frames) or self._ended, timeout_seconds)

    def get(self) -> tuple[Frame, float] | None:
        """Wait for the oldest frame and the moment it was due; None behind the last one."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._frames) or self._ended)
            if self._frames:
                self._drop()
                found = self._frames.popleft()
                return found.frame, found.due
            error, self._error = self._error, None
            if error is not None:
                raise error
            return None

    def clear(self) -> None:
        """Let go of all frames."""
        with self._changed:
            self._frames.clear()

    def _drop(self) -> None:
        oldest = time.monotonic() - self._max_age_seconds
        # The newest one stays however old it is: a reader that is always late still sees something.
        while len(self._frames) > self._depth or (len(self._frames) > 1 and self._frames[0].came < oldest):
            lost = self._frames.popleft().frame
            self.dropped += 1
            _log.debug("the frame at %.3f s was dropped: its reader is slower than the source", lost.pts_seconds)
            if lost.gap_seconds:  # the gap goes on up to the next frame that is seen
                after = self._frames.popleft()
                gap = lost.gap_seconds + after.frame.gap_seconds
                self._frames.appendleft(replace(after, frame=replace(after.frame, gap_seconds=gap)))


class PushedSource(Source):
    """Frames that other threads hand over, such as those of a socket, while a session draws them.

    The newest are kept; those that the session is too slow for are dropped and counted. Times never run backwards:
    they are those given, or go on from the frame before by the time between two arrivals.

    Args:
        sampler: which frames are kept; None: every one.
        depth: frames that wait for their reader at most.
        max_lag_seconds: how long a frame waits before a newer one pushes it out.
        start_seconds: time of a first frame that comes without one; where a restored stream goes on, its newest time.

    Raises:
        ConfigError: a value outside its range.
    """

    live = True

    def __init__(
        self,
        sampler: FrameSampler | None = None,
        depth: int = 8,
        max_lag_seconds: float = 2.0,
        start_seconds: float = 0.0,
    ) -> None:
        self._keeps = sampler or FrameSampler()
        self._keeps.check_length(None)
        if depth < 1:
            raise ConfigError(f"depth is {depth}, must be at least 1", "a frame has to wait until it is drawn")
        if not (math.isfinite(max_lag_seconds) and max_lag_seconds >= 0):
            raise ConfigError(f"max_lag_seconds is {max_lag_seconds}, must be a number of at least 0", "leave it out")
        self._start_seconds = start_seconds
        self._sampler: Sampler | None = None  # begins with the first frame
        self._newest = FrameBuffer(depth, max_lag_seconds)
        self._seconds: float | None = None  # of the frame that came last
        self._came = 0.0  # when it did, by time.monotonic
        self._due_seconds: float | None = None  # when the frame came that was handed out last
        self._gaps, self._gap_seconds, self._untold_gap_seconds = 0, 0.0, 0.0
        self._ended = False
        self._putting = threading.Lock()

    @property
    def status(self) -> LiveStatus:
        """How it is doing now."""
        lag = 0.0 if self._due_seconds is None else time.monotonic() - self._due_seconds
        return LiveStatus(not self._ended, lag, self._newest.dropped, self._gaps, self._gap_seconds)

    def put(self, picture: Frame | torch.Tensor | Pixels, pts_seconds: float | None = None) -> None:
        """Hand over a frame; never waits. Any thread may.

        Args:
            picture: a frame, or pixels [3, H, W] uint8, RGB, upright; these are copied.
            pts_seconds: time of pixels; None: by their arrival.

        Raises:
            ConfigError: a time before that of the frame before, a second time for a frame, no frame at all, or one
                that comes after the end.
            VideoError: pixels of a wrong shape or dtype, or a time that is not a finite number.
        """
        with self._putting:
            now = time.monotonic()
            if self._ended:
                raise ConfigError("a frame came after the end of its source", "put it into a new PushedSource")
            frame = self._framed(picture, pts_seconds, now)
            if self._seconds is not None and frame.pts_seconds < self._seconds:
                rule = f"a frame at {frame.pts_seconds} s came after one at {self._seconds} s"
                raise ConfigError(rule, "hand frames over in the order of their times, or leave the times out")
            self._seconds, self._came = frame.pts_seconds, now
            self._gaps += frame.gap_seconds > 0
            self._gap_seconds += frame.gap_seconds
            self._untold_gap_seconds += frame.gap_seconds
            if self._sampler is None:
                self._sampler = self._keeps.begin(frame.pts_seconds)
            if self._sampler.keep(frame.pts_seconds):
                self._newest.put(replace(frame, gap_seconds=self._untold_gap_seconds), now)
                self._untold_gap_seconds = 0.0
                if self._sampler.exhausted:
                    self._newest.end()

    def end(self) -> None:
        """No frame follows; those that wait are still handed out."""
        with self._putting:
            self._ended = True
            self._newest.end()

    def ready(self, timeout_seconds: float) -> bool:
        """Wait until the next frame, or the end, is there; False if it is not by then."""
        return self._newest.ready(timeout_seconds)

    def close(self) -> None:
        """Stop reading; frames that wait are let go, and none can be put any more."""
        self.end()
        self._newest.clear()

    def __next__(self) -> Frame:
        found = self._newest.get()
        if found is None:
            raise StopIteration
        frame, self._due_seconds = found
        return frame

    def __repr__(self) -> str:
        return f"PushedSource(pts_seconds={self._seconds}, dropped={self._newest.dropped}, ended={self._ended})"

    def _framed(self, picture: Frame | torch.Tensor | Pixels, pts_seconds: float | None, now: float) -> Frame:
        if isinstance(picture, Frame):
            if pts_seconds is not None:
                rule = f"pts_seconds is {pts_seconds}, but the frame has the time {picture.pts_seconds} s already"
                raise ConfigError(rule, "leave pts_seconds out, or hand over the frame's pixels alone")
            return picture
        # Pixels are often a view of a buffer that is written to again.
        if isinstance(picture, np.ndarray):
            picture = torch.from_numpy(np.array(picture, order="C"))
        elif isinstance(picture, torch.Tensor):
            picture = picture.clone()
        else:
            raise ConfigError(f"{kind_of(picture)} was put", "put a statekv.Frame, or pixels [3, H, W] uint8")
        if pts_seconds is None:
            pts_seconds = self._start_seconds if self._seconds is None else self._seconds + now - self._came
        return Frame(picture, pts_seconds)
