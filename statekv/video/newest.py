"""Frames between a live source and a slower reader: the oldest make room."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, replace

from statekv.video.frame import Frame


@dataclass(frozen=True, slots=True)
class _Waiting:
    frame: Frame
    due: float
    came: float


class NewestFrames:
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
            if lost.gap_seconds:  # the gap goes on up to the next frame that is seen
                after = self._frames.popleft()
                gap = lost.gap_seconds + after.frame.gap_seconds
                self._frames.appendleft(replace(after, frame=replace(after.frame, gap_seconds=gap)))
