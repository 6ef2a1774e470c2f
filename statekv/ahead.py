"""What happens to a source's frames before their turn: read by the batch, and looked at by the batch."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence

import torch

from statekv.cache.stream import StreamState
from statekv.interrupts import deferred_interrupts
from statekv.models.base import Seen, VideoModel
from statekv.progress import Seconds
from statekv.stepper import memory_limit
from statekv.video.frame import Frame


class Ahead:
    """Frames read before their turn, and steps whose pictures have passed the vision tower before theirs.

    On CUDA the tower works on a stream of its own, a batch ahead of the language model.

    Args:
        model: whose tower it is.
        state: the stream that the frames will enter; it is not changed.
        seconds: where the time is noted.
    """

    def __init__(self, model: VideoModel, state: StreamState, seconds: Seconds) -> None:
        self._model = model
        self._state = state
        self._seconds = seconds
        self._frames: deque[Frame] = deque()
        self._error: Exception | None = None  # what ended the source, raised behind the frames before it
        self._looked: deque[tuple[Seen, torch.cuda.Event | None]] = deque()
        device = model.model.device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def draw(self, source: Iterator[Frame], waiting: Sequence[Frame]) -> Frame | None:
        """The source's next frame, None behind its last one.

        Args:
            source: where frames come from; its exception is raised behind the frames before it.
            waiting: frames that the next one makes a step with.

        Raises:
            MemoryLimitError: the vision tower ran out of memory; no frame is lost.
        """
        batch = self._model.frames_per_step
        if self._state.frames:  # the first step does not wait for a batch
            batch *= self._state.config.vision_batch
        if len(self._frames) <= (batch if self._stream is not None else 0):
            self._read(source, len(self._frames) + batch)
        self._look([*waiting, *self._frames])
        if self._frames:
            return self._frames.popleft()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return None

    def take(self, frames: Sequence[Frame]) -> Seen:
        """What the tower makes of one step, also where nobody has looked at just these frames before."""
        if self._looked:
            seen, done = self._looked.popleft()
            if [id(frame) for frame in seen.frames] == [id(frame) for frame in frames]:
                _hand_over(seen, done)
                return seen
            self._looked.clear()  # other frames were pushed in between
        (seen,) = self._model.look([frames], self._state.frames_expected)
        return seen

    def offer(self, seen: Seen) -> None:
        """Hand over a step that another stream of the same frames has had looked at."""
        self._looked.append((seen, None))

    def forget(self) -> None:
        """Let go of all frames."""
        self._frames.clear()
        self._looked.clear()

    def _read(self, source: Iterator[Frame], frames: int) -> None:
        began = time.perf_counter()
        try:
            while len(self._frames) < frames and self._error is None:
                with deferred_interrupts(second_gets_through=True):  # an interrupted source could not go on
                    frame = next(source, None)
                    if frame is None:
                        return
                    self._frames.append(frame)
        except Exception as error:
            self._error = error
        finally:
            self._seconds.decode += time.perf_counter() - began

    def _look(self, frames: Sequence[Frame]) -> None:
        """Look at all full steps of `frames` that come behind those looked at before."""
        if self._state.config.recall == "last_frames":
            return  # a question looks at the few frames that it sees
        frames = frames[sum(len(seen.frames) for seen, _ in self._looked) :]
        size = self._model.frames_per_step
        steps = [frames[i : i + size] for i in range(0, len(frames) - size + 1, size)]
        if not steps:
            return
        began = time.perf_counter()
        with torch.inference_mode(), memory_limit(), torch.cuda.stream(self._stream):  # None changes nothing
            looked = self._model.look(steps, self._state.frames_expected)
            done = self._stream.record_event() if self._stream is not None else None
        self._looked.extend((seen, done) for seen in looked)
        self._seconds.vision += time.perf_counter() - began


def _hand_over(seen: Seen, done: torch.cuda.Event | None) -> None:
    if done is None:
        return
    here = torch.cuda.current_stream(seen.features.device)
    here.wait_event(done)
    for tensor in (seen.features, *seen.deepstack):
        tensor.record_stream(here)
