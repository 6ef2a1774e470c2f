"""Frames on their way into a stream: they wait until they make a step, and the step enters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from statekv.cache.stream import StreamState
from statekv.engine.ahead import Ahead, check_frame
from statekv.engine.new_step import NewStep
from statekv.engine.progress import Progress
from statekv.engine.saving import Standing
from statekv.errors import ConfigError, StateKVError
from statekv.runner.stepper import Stepper
from statekv.video.frame import Frame
from statekv.video.live import LiveSource
from statekv.video.status import LiveStatus


class Feed:
    """What a session holds besides its stream. One thread at a time.

    Args:
        stepper: the loaded model.
        state: the stream.
        source: frames to draw; None where all are pushed.
        standing: where another session stood, which this one goes on from.

    Attributes:
        ahead: frames read, and looked at, before their turn.
        seconds: where the time went.
        steps: that have entered.
        ended: whether the source's end has been seen.
    """

    def __init__(
        self, stepper: Stepper, state: StreamState, source: Iterator[Frame] | None, standing: Standing
    ) -> None:
        if source is None and standing.ahead:
            source = iter(())  # what was read before its turn is still to be drawn
        self.stepper, self.state, self.source = stepper, state, source
        self.seconds, self.steps = replace(standing.seconds), standing.steps
        self.waiting = list(standing.waiting)
        self.ended = False
        self.ahead = Ahead(stepper.model, state, self.seconds)
        self.ahead.hold(standing.ahead, standing.looked)
        self.only_newest = state.config.recall == "last_frames"
        self._passed, self._broken = standing.passed, standing.broken

    @property
    def frames(self) -> int:
        """Pictures seen, also those that still wait: for a partner to make a step, or for a question."""
        return (self._passed if self.only_newest else self.state.frames) + len(self.waiting)

    @property
    def live(self) -> LiveStatus | None:
        """How the live source is doing; None for other sources."""
        return self.source.status if isinstance(self.source, LiveSource) else None

    @property
    def standing(self) -> Standing:
        """From where another session can go on."""
        ahead, looked = self.ahead.held
        return Standing(self.seconds, self.steps, self.waiting, self._passed, self._broken, ahead, looked)

    def check(self) -> None:
        """Raise a StateKVError if a failed step has left the stream so that nothing can enter."""
        if self._broken:
            raise StateKVError(self._broken, "questions still work; open a new session to watch on")

    def drawn(self) -> Iterator[Frame]:
        """The source.

        Raises:
            ConfigError: there is none.
        """
        if self.source is None:
            raise ConfigError("this session has no source to watch", "push frames, or open it with a file")
        return self.source

    def draw(self, look: bool = True) -> Frame | None:
        """The source's next frame, None behind its last one; see `Ahead.draw`."""
        frame = self.ahead.draw(self.drawn(), self.waiting, look)
        self.ended = frame is None
        return frame

    def put(self, frame: Frame) -> NewStep | Progress | None:
        """Let a frame wait.

        Returns:
            The step that it makes, to be entered and finished; how far the stream is, where only the newest frames
            count and none enters before a question; or None: it waits for a partner.

        Raises:
            ConfigError: not a frame, or one of another size than its partner in the step.
        """
        per_step = self.stepper.model.frames_per_step
        check_frame(frame, self.waiting[-1:] if per_step > 1 else [])
        self.waiting.append(frame)
        if self.only_newest:
            return self._pass(per_step)
        if len(self.waiting) < per_step:
            return None
        frames, self.waiting = self.waiting, []
        return NewStep(self.stepper, self.state, self.ahead, frames)

    def take(self, step: NewStep) -> Progress:
        """Let a step enter alone."""
        try:
            step.enter()
            step.prefill()
        except BaseException as error:
            self.undo(step, error)
            raise
        return self.finish(step)

    def finish(self, step: NewStep) -> Progress:
        """Take note of a step that has entered."""
        self.seconds.vision += step.vision_seconds
        self.seconds.prefill += step.prefill_seconds
        self.steps += 1
        if self.steps == 1:
            self.stepper.reserve(self.state)
        carried, tokens = self.state.carried.length, self.state.tokens
        newest = step.frames[-1].pts_seconds
        return Progress(self.steps, self.state.frames, newest, step.prefill_seconds, carried, tokens, self.live)

    def undo(self, step: NewStep, error: BaseException) -> None:
        """Take back a step that failed. Either its partners wait as before, or nothing can enter any more."""
        self._broken = step.undo(error)
        if not self._broken:
            self.waiting = step.frames[:-1]

    def free(self) -> None:
        """Let go of all frames and of the source."""
        self.source = None
        self.waiting.clear()
        self.ahead.forget()

    def _pass(self, per_step: int) -> Progress | None:
        """Let go of the frame that a newer one pushes out."""
        passed = max(0, len(self.waiting) - self.state.config.last_frames)
        del self.waiting[:passed]
        self._passed += passed
        self.steps = self.frames // per_step
        newest = self.waiting[-1].pts_seconds
        return Progress(self.steps, self.frames, newest, 0.0, 0, 0, self.live) if self.frames % per_step == 0 else None
