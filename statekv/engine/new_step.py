"""One step on its way into a stream."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from statekv.cache.stream import StreamState
from statekv.engine.ahead import Ahead
from statekv.errors import MemoryLimitError, StateKVError
from statekv.models.base import Segment
from statekv.runner.memory import memory_limit
from statekv.runner.stepper import Stepper
from statekv.video.frame import Frame


class NewStep:
    """The frames of one step: `enter`, then `prefill` alone or with others; `undo` where either failed.

    Args:
        stepper: the loaded model.
        state: the stream.
        ahead: what may have looked at the frames already.
        frames: of the step.

    Attributes:
        segments: what enters.
        vision_seconds, prefill_seconds: what it took, in a batch its share.
    """

    def __init__(self, stepper: Stepper, state: StreamState, ahead: Ahead, frames: Sequence[Frame]) -> None:
        self.stepper, self.state, self.frames = stepper, state, list(frames)
        self.segments: list[Segment] = []
        self.vision_seconds = self.prefill_seconds = 0.0
        self._ahead = ahead
        self._mark = state.mark()

    @torch.inference_mode()
    def enter(self) -> None:
        """Have the frames looked at, find their place in the stream, and check that there is one."""
        began = time.perf_counter()
        with memory_limit():
            self.segments = self.stepper.enter(self.state, self._ahead.take(self.frames))
            self._mark = self.state.mark()  # entering may have moved positions
            if len(self.segments) == 1:  # a prefix has to enter before its step can be checked
                self.stepper.check(self.state, self.segments[0])
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
                self.stepper.prefill(self.state, segment)
        self.prefill_seconds = time.perf_counter() - began

    def undo(self, error: BaseException) -> str:
        """After an error: the stream ends before the step. Why nothing can enter any more; "" while it can."""
        tokens = self._mark.tokens
        self.state.crop_to(self._mark)
        if isinstance(error, StateKVError) and not isinstance(error, MemoryLimitError):
            return ""  # raised before the first layer: nothing has changed
        # Layers in front of the failure have carried the step already, those behind it have not.
        return f"a step failed after {tokens} tokens ({type(error).__name__})"
