"""Frames on their way into a stream: read ahead, seen by the vision tower in batches, entered step by step."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch

from statekv.cache.stream import StreamState
from statekv.engine.choice import gate_of, sampler_of
from statekv.engine.interrupts import deferred_interrupts
from statekv.engine.progress import Progress, Seconds
from statekv.engine.snapshot import SessionSnapshot
from statekv.errors import ConfigError, MemoryLimitError, PolicyError, StateKVError, kind_of
from statekv.models.adapter import Segment
from statekv.models.encoded import EncodedStep
from statekv.reduce.base import check_memory, own_memory
from statekv.runner.memory import memory_limit
from statekv.runner.runner import ModelRunner
from statekv.video.frame import Frame
from statekv.video.source import LiveStatus, Source, as_source


class FrameQueue:
    """What a session holds besides its stream. One thread at a time.

    Args:
        source: frames to draw; None where all are pushed.
        snapshot: where another session stood, which this one goes on from.

    Attributes:
        sampler: which frames are seen.
        ahead: frames read, and looked at, before their turn.
        ended: whether the source's end has been seen.
    """

    def __init__(
        self, runner: ModelRunner, state: StreamState, source: Iterable[Frame] | None, snapshot: SessionSnapshot
    ) -> None:
        if source is None and snapshot.ahead:
            source = ()  # what was read before its turn is still to be drawn
        self.runner, self.state = runner, state
        self.source = source
        self.seconds, self.steps = replace(snapshot.seconds), snapshot.steps
        self.waiting = list(snapshot.waiting)
        self.ended = False
        self.ahead = VisionPrefetch(runner, state, self.seconds)
        self.ahead.hold(snapshot.ahead, snapshot.looked)
        self.sampler = sampler_of(state.config)
        self._passed, self._broken = snapshot.passed, snapshot.broken

    @property
    def frames(self) -> int:
        """Pictures seen, also those that still wait: for a partner to make a step, or for a question."""
        return (self.state.frames if self.sampler.newest is None else self._passed) + len(self.waiting)

    @property
    def source(self) -> Source | None:
        """Where frames are drawn from; any iterable of frames may be given."""
        return self._source

    @source.setter
    def source(self, frames: Iterable[Frame] | None) -> None:
        self._source = None if frames is None else as_source(frames)

    @property
    def live(self) -> LiveStatus | None:
        """How the live source is doing; None for other sources."""
        return None if self.source is None else self.source.status

    @property
    def snapshot(self) -> SessionSnapshot:
        """From where another session can go on."""
        ahead, looked = self.ahead.held
        return SessionSnapshot(self.seconds, self.steps, self.waiting, self._passed, self._broken, ahead, looked)

    def check(self) -> None:
        """Raise a StateKVError if a failed step has left the stream so that nothing can enter."""
        if self._broken:
            raise StateKVError(self._broken, "questions still work; open a new session to watch on")

    def drawn(self) -> Source:
        """The source; a ConfigError where there is none."""
        if self.source is None:
            raise ConfigError("this session has no source to watch", "push frames, or open it with a file")
        return self.source

    def draw(self, look: bool = True) -> Frame | None:
        """The source's next frame, None behind its last one, or where its gate lets none through yet; see `ended`."""
        frame = self.ahead.draw(self.drawn(), self.waiting, look)
        self.ended = frame is None and self.ahead.ended
        return frame

    def put(self, frame: Frame, lent: bool = False) -> PendingStep | Progress | None:
        """Let a frame wait.

        Args:
            frame: the stream's next one. One of another size than its partners begins a step, and they make one without
                it.
            lent: whether its pixels are somebody else's, who may write others there: what waits is copied.

        Returns:
            The step that it completes, to be entered and finished; how far the stream is, where only the newest frames
            count and none enters before a question; or None: it waits for a partner.

        Raises:
            ConfigError: not a frame, or one from before the stream's first.
        """
        per_step = self.runner.model.frames_per_step
        self._check(frame)
        fits = self.sampler.newest is not None or not self.waiting or same_size(self.waiting[-1], frame)
        waits = self.sampler.newest is not None or not fits or len(self.waiting) + 1 < per_step
        kept = replace(frame, data=frame.data.clone()) if lent and waits else frame
        if not fits:
            frames, self.waiting = self.waiting, [kept]
            return PendingStep(self.runner, self.state, self.ahead, frames)
        self.waiting.append(kept)
        if self.sampler.newest is not None:
            return self._pass(self.sampler.newest, per_step)
        if waits:
            return None
        frames, self.waiting = self.waiting, []
        return PendingStep(self.runner, self.state, self.ahead, frames)

    def _check(self, frame: Frame) -> None:
        check_frame(frame)
        first = self.state.origin_seconds
        if first is None and self.waiting:
            first = self.waiting[0].pts_seconds
        if first is not None and frame.pts_seconds < first:
            rule = f"a frame of {frame.pts_seconds:g} s comes before the stream's first, of {first:g} s"
            raise ConfigError(rule, "give frames times by a clock that is not set back")

    def take(self, step: PendingStep) -> Progress:
        """Let a step enter alone."""
        try:
            step.enter()
            step.prefill()
        except BaseException as error:
            self.undo(step, error)
            raise
        return self.finish(step)

    def finish(self, step: PendingStep) -> Progress:
        """Take note of a step that has entered."""
        self.seconds.vision += step.vision_seconds
        self.seconds.prefill += step.prefill_seconds
        self.steps += 1
        if self.steps == 1:
            self.runner.reserve(self.state)
        carried, tokens = self.state.carried.length, self.state.tokens
        newest = step.frames[-1].pts_seconds
        return Progress(self.steps, self.state.frames, newest, step.prefill_seconds, carried, tokens, self.live)

    def undo(self, step: PendingStep, error: BaseException) -> None:
        """Take back a step that failed. Either its partners wait as before, or nothing can enter any more."""
        self._broken = step.undo(error)
        if not self._broken:
            # A frame of another size, whose partners make a step without it, waits already, and comes again like all.
            self.waiting = step.frames if self.waiting else step.frames[:-1]

    def free(self) -> None:
        """Let go of all frames and of the source."""
        self.source = None
        self.waiting.clear()
        self.ahead.forget()

    def _pass(self, newest: int, per_step: int) -> Progress | None:
        """Let go of the frame that a newer one pushes out."""
        passed = max(0, len(self.waiting) - newest)
        del self.waiting[:passed]
        self._passed += passed
        self.steps = self.frames // per_step
        if self.frames % per_step:
            return None
        return Progress(self.steps, self.frames, self.waiting[-1].pts_seconds, 0.0, 0, 0, self.live)


_POLL_SECONDS = 0.1
_GATE = "gate"  # where its memory is among those of a stream


class VisionPrefetch:
    """Frames read before their turn, and steps whose pictures have passed the vision tower before theirs.

    On CUDA the tower works on a stream of its own, a batch ahead of the language model.

    Args:
        state: the stream that the frames will enter; it is not changed.

    Attributes:
        ended: whether the source's end was seen when a frame was drawn last.
    """

    def __init__(self, runner: ModelRunner, state: StreamState, seconds: Seconds) -> None:
        self._runner = runner
        self._per_step = runner.model.frames_per_step
        self._state = state
        self._only_newest = sampler_of(state.config).newest is not None
        self._gate = gate_of(state.config)
        self.ended = False
        self._seconds = seconds
        self._frames: deque[Frame] = deque()
        self._error: Exception | None = None  # what ended the source, raised behind the frames before it
        self._looked: deque[tuple[EncodedStep, torch.cuda.Event | None]] = deque()
        device = runner.model.model.device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def wait(self, source: Source, pause: Callable[[], bool] | None = None) -> bool:
        """Wait until the source has a frame, or has ended; False where `pause`, asked first and several times a second,
        says so before.
        """
        while pause is None or not pause():
            if self.ready(source, _POLL_SECONDS):
                return True
        return False

    def ready(self, source: Source, timeout_seconds: float = 0.0) -> bool:
        """Whether `draw` has something to say without waiting for a camera."""
        return bool(self._frames) or source.ready(timeout_seconds)

    def draw(self, source: Source, waiting: Sequence[Frame], look: bool = True) -> Frame | None:
        """The source's next frame, which makes a step with those that wait; None behind its last one, or where the gate
        lets none through of those read now.

        A live source is read frame by frame: a batch would keep its first frames waiting for its last. The source's
        exception is raised behind the frames before it.

        Args:
            look: whether the tower looks at a live source's frames at once; `take` makes up for it.

        Raises:
            MemoryLimitError: the vision tower ran out of memory; no frame is lost.
        """
        batch = 1 if source.live else self._per_step
        if self._state.frames and not source.live:  # the first step does not wait for a batch
            batch *= self._state.config.vision_batch
        if len(self._frames) <= (batch if self._stream is not None and not source.live else 0):
            self._read(source, len(self._frames) + batch)
        if look or not source.live:
            self._look([*waiting, *self._frames])
        if self._frames:
            return self._frames.popleft()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return None

    def admits(self, frame: Frame) -> bool:
        """Whether the gate lets a frame through; asked once for each, in their order, before the tower looks.

        Raises:
            ConfigError: not a frame, or the gate does not say yes or no, or remembers what a save cannot hold.
        """
        if self._gate is None:
            return True
        check_frame(frame)
        name, memory = type(self._gate).__name__, own_memory(self._state.memories.get(_GATE, {}))
        found = self._gate.admit(frame, memory)
        if not isinstance(found, bool):
            raise ConfigError(f"gate {name} returned {kind_of(found)}", "return True or False")
        check_memory(f"gate {name}", memory)
        self._state.memories = {**self._state.memories, _GATE: memory}
        return found

    @property
    def looked(self) -> bool:
        """Whether the tower has looked at frames whose turn has not come yet."""
        return bool(self._looked)

    def take(self, frames: Sequence[Frame]) -> EncodedStep:
        """What the tower makes of one step, also where nobody has looked at just these frames before."""
        if self._looked:
            seen, done = self._looked.popleft()
            if [id(frame) for frame in seen.frames] == [id(frame) for frame in frames]:
                _hand_over(seen, done)
                return seen
            self._looked.clear()  # other frames were pushed in between
        (seen,) = self._runner.encode([frames], self._state.frames_expected)
        return seen

    def offer(self, seen: EncodedStep) -> None:
        """Hand over a step that another stream of the same frames has had looked at."""
        self._looked.append((seen, None))

    @property
    def held(self) -> tuple[list[Frame], list[EncodedStep]]:
        """Frames before their turn, and what the tower has made of some steps; finished, where it works beside us."""
        for _, done in self._looked:
            if done is not None:
                done.synchronize()
        return list(self._frames), [seen for seen, _ in self._looked]

    def hold(self, frames: Sequence[Frame], looked: Sequence[EncodedStep]) -> None:
        """Begin with what another one held."""
        self._frames.extend(frames)
        self._looked.extend((seen, None) for seen in looked)

    def forget(self) -> None:
        """Let go of all frames."""
        self._frames.clear()
        self._looked.clear()

    def _read(self, source: Source, frames: int) -> None:
        began = time.perf_counter()
        try:
            # No more than these, also where the gate keeps some out: somebody may be waiting to ask.
            for _ in range(frames - len(self._frames) if self._error is None else 0):
                # An interrupted generator could not go on; a live source could, and may keep one waiting.
                with nullcontext() if source.live else deferred_interrupts(second_gets_through=True):
                    frame = next(source, None)
                    self.ended = frame is None
                    if frame is None:
                        return
                    if self.admits(frame):
                        self._frames.append(frame)
        except Exception as error:
            self._error = error
        finally:
            self._seconds.decode += time.perf_counter() - began

    def _look(self, frames: Sequence[Frame]) -> None:
        """Look at all full steps of `frames` that come behind those looked at before."""
        if self._only_newest:
            return  # a question looks at the few frames that it sees
        frames = frames[sum(len(seen.frames) for seen, _ in self._looked) :]
        steps = full_steps(frames, self._per_step)
        if not steps:
            return
        began = time.perf_counter()
        stream = torch.cuda.stream(self._stream)  # None changes nothing
        with stream:
            looked = self._runner.encode(steps, self._state.frames_expected)
            done = self._stream.record_event() if self._stream is not None else None
        self._looked.extend((seen, done) for seen in looked)
        self._seconds.vision += time.perf_counter() - began


def _hand_over(seen: EncodedStep, done: torch.cuda.Event | None) -> None:
    if done is None:
        return
    here = torch.cuda.current_stream(seen.features.device)
    here.wait_event(done)
    for tensor in (seen.features, *seen.deepstack):
        tensor.record_stream(here)


def check_frame(frame: Frame) -> None:
    """Raise ConfigError unless this is a frame."""
    if not isinstance(frame, Frame):
        raise ConfigError(f"{kind_of(frame)} was pushed", "push statekv.Frame(data, pts_seconds)")


def same_size(one: Frame, other: Frame) -> bool:
    """Whether two frames can make one step."""
    return one.data.shape == other.data.shape


def full_steps(frames: Sequence[Frame], per_step: int) -> list[list[Frame]]:
    """Frames step by step, as `FrameQueue.put` makes them, but for the last ones, which wait for partners."""
    steps: list[list[Frame]] = []
    waiting: list[Frame] = []
    for frame in frames:
        if waiting and not same_size(waiting[-1], frame):
            steps.append(waiting)
            waiting = []
        waiting = [*waiting, frame]
        if len(waiting) == per_step:
            steps.append(waiting)
            waiting = []
    return steps


class PendingStep:
    """The frames of one step: `enter`, then `prefill` alone or with others; `undo` where either failed.

    Args:
        ahead: what may have looked at the frames already.

    Attributes:
        vision_seconds, prefill_seconds: what it took, in a batch its share.
    """

    def __init__(self, runner: ModelRunner, state: StreamState, ahead: VisionPrefetch, frames: Sequence[Frame]) -> None:
        self.runner, self.state, self.frames = runner, state, list(frames)
        self.segments: list[Segment] = []
        self.vision_seconds = self.prefill_seconds = 0.0
        self._ahead = ahead
        self._mark = state.mark()

    @torch.inference_mode()
    def enter(self) -> None:
        """Have the frames looked at, find their place in the stream, and check that there is one."""
        began = time.perf_counter()
        with memory_limit():
            self.segments = self.runner.segments_of(self.state, self._ahead.take(self.frames))
            # Older steps may have moved, which stays if this one is taken back; what it has left to remember does not.
            self._mark = replace(self.state.mark(), memories=self._mark.memories)
            if len(self.segments) == 1:  # a prefix has to enter before its step can be checked
                self.state.expect(self.segments[0])
        self.vision_seconds = time.perf_counter() - began
        place = self.state.uncompacted(self.segments[-1].moment)
        for gap in (frame for frame in self.frames if frame.gap_seconds):
            self.state.note("gap", 0, gap.pts_seconds - gap.gap_seconds, place)

    @torch.inference_mode()
    def prefill(self) -> None:
        """Run it through the language model, alone."""
        began = time.perf_counter()
        with memory_limit():
            for segment in self.segments:
                self.runner.enter(self.state, segment)
        self.prefill_seconds = time.perf_counter() - began

    def undo(self, error: BaseException) -> str:
        """After an error: the stream ends before the step. Why nothing can enter any more; "" while it can."""
        tokens = self._mark.tokens
        self.state.crop_to(self._mark)
        if isinstance(error, StateKVError) and not isinstance(error, (MemoryLimitError, PolicyError)):
            return ""  # raised before the first layer: nothing has changed
        # Layers in front of the failure have carried the step already, those behind it have not.
        return f"a step failed after {tokens} tokens ({type(error).__name__})"
