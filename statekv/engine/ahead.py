"""What happens to a source's frames before their turn: read by the batch, and looked at by the batch."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import torch

from statekv.cache.stream import StreamState
from statekv.engine.interrupts import deferred_interrupts
from statekv.engine.progress import Seconds
from statekv.errors import ConfigError
from statekv.models.base import Seen, VideoModel
from statekv.runner.memory import memory_limit
from statekv.video.frame import Frame
from statekv.video.live import LiveSource

_POLL_SECONDS = 0.1


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

    def wait(self, source: Iterator[Frame], pause: Callable[[], bool] | None = None) -> bool:
        """Wait until a live source has a frame, or has ended; False where `pause` says so before.

        Args:
            source: where frames come from; any other than a live one is ready at once.
            pause: asked first, and several times a second meanwhile.
        """
        while pause is None or not pause():
            if self.ready(source, _POLL_SECONDS):
                return True
        return False

    def ready(self, source: Iterator[Frame], timeout_seconds: float = 0.0) -> bool:
        """Whether `draw` has something to say without waiting for a camera."""
        return not isinstance(source, LiveSource) or bool(self._frames) or source.ready(timeout_seconds)

    def draw(self, source: Iterator[Frame], waiting: Sequence[Frame], look: bool = True) -> Frame | None:
        """The source's next frame, None behind its last one.

        A live source is read frame by frame: a batch would keep its first frames waiting for its last.

        Args:
            source: where frames come from; its exception is raised behind the frames before it.
            waiting: frames that the next one makes a step with.
            look: whether the tower looks at a live source's frames at once; `take` makes up for it.

        Raises:
            MemoryLimitError: the vision tower ran out of memory; no frame is lost.
        """
        live = isinstance(source, LiveSource)
        batch = 1 if live else self._model.frames_per_step
        if self._state.frames and not live:  # the first step does not wait for a batch
            batch *= self._state.config.vision_batch
        if len(self._frames) <= (batch if self._stream is not None and not live else 0):
            self._read(source, len(self._frames) + batch)
        if look or not live:
            self._look([*waiting, *self._frames])
        if self._frames:
            return self._frames.popleft()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return None

    @property
    def looked(self) -> bool:
        """Whether the tower has looked at frames whose turn has not come yet."""
        return bool(self._looked)

    def take(self, frames: Sequence[Frame]) -> Seen:
        """What the tower makes of one step, also where nobody has looked at just these frames before."""
        if self._looked:
            seen, done = self._looked.popleft()
            if [id(frame) for frame in seen.frames] == [id(frame) for frame in frames]:
                _hand_over(seen, done)
                return seen
            self._looked.clear()  # other frames were pushed in between
        with self._model.turns:
            (seen,) = self._model.look([frames], self._state.frames_expected)
        return seen

    def offer(self, seen: Seen) -> None:
        """Hand over a step that another stream of the same frames has had looked at."""
        self._looked.append((seen, None))

    @property
    def held(self) -> tuple[list[Frame], list[Seen]]:
        """Frames before their turn, and what the tower has made of some steps; finished, where it works beside us."""
        for _, done in self._looked:
            if done is not None:
                done.synchronize()
        return list(self._frames), [seen for seen, _ in self._looked]

    def hold(self, frames: Sequence[Frame], looked: Sequence[Seen]) -> None:
        """Begin with what another one held."""
        self._frames.extend(frames)
        self._looked.extend((seen, None) for seen in looked)

    def forget(self) -> None:
        """Let go of all frames."""
        self._frames.clear()
        self._looked.clear()

    def _read(self, source: Iterator[Frame], frames: int) -> None:
        began = time.perf_counter()
        try:
            while len(self._frames) < frames and self._error is None:
                # An interrupted generator could not go on; a live source could, and may keep one waiting.
                live = isinstance(source, LiveSource)
                with nullcontext() if live else deferred_interrupts(second_gets_through=True):
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
        stream = torch.cuda.stream(self._stream)  # None changes nothing
        with torch.inference_mode(), memory_limit(), self._model.turns, stream:
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


def check_frame(frame: Frame, partners: Sequence[Frame]) -> None:
    """Raise ConfigError unless this is a frame, and of the size of those that it makes a step with."""
    if not isinstance(frame, Frame):
        raise ConfigError(f"a {type(frame).__name__} was pushed", "push statekv.Frame(data, pts_seconds)")
    if partners and frame.data.shape != partners[0].data.shape:
        sizes = [tuple(picture.data.shape[1:]) for picture in (partners[0], frame)]
        raise ConfigError(f"two frames of one step are {sizes[0]} and {sizes[1]} pixels", "resize them to one size")
