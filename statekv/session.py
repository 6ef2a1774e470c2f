"""One video and its questions."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from types import TracebackType

import torch

from statekv import asking
from statekv.ahead import Ahead, check_frame
from statekv.cache.stream import StreamState
from statekv.decoding import Sampling
from statekv.errors import ConfigError, MemoryLimitError, StateKVError
from statekv.interrupts import deferred_interrupts
from statekv.models.base import Seen
from statekv.progress import Progress, Seconds
from statekv.saving import Standing, save_session
from statekv.stepper import Stepper, memory_limit, uncompacted
from statekv.video.frame import Frame
from statekv.video.live import LiveSource
from statekv.video.resume import Footage
from statekv.video.status import LiveStatus


@dataclass
class Session:
    """A stream that grows frame by frame and can be asked at any time; asking changes nothing.

    Made by `Engine.open`.

    Attributes:
        stepper: the loaded model.
        state: both memories.
        source: frames that `watch` draws from; None where all come through `push`.
        seconds: where the time went.
    """

    stepper: Stepper
    state: StreamState
    source: Iterator[Frame] | None = None
    seconds: Seconds = field(default_factory=Seconds)
    steps: int = 0
    _waiting: list[Frame] = field(default_factory=list)
    _passed: int = 0  # frames that only the newest ones kept out of every answer
    _broken: str = ""
    _closed: bool = False
    _answering: bool = False

    def __post_init__(self) -> None:
        self._ahead = Ahead(self.stepper.model, self.state, self.seconds)
        self._only_newest = self.state.config.recall == "last_frames"

    @classmethod
    def resumed(
        cls, stepper: Stepper, state: StreamState, standing: Standing, source: Iterator[Frame] | None
    ) -> Session:
        """A session that goes on from where another one stood."""
        s, waiting = standing, list(standing.waiting)
        if source is None and s.ahead:
            source = iter(())  # what was read before its turn is still to be watched
        session = cls(stepper, state, source, replace(s.seconds), s.steps, waiting, s.passed, s.broken)
        session._ahead.hold(s.ahead, s.looked)
        return session

    @property
    def frames(self) -> int:
        """Pictures seen, also those that still wait: for a partner to make a step, or for a question."""
        return (self._passed if self._only_newest else self.state.frames) + len(self._waiting)

    @property
    def live(self) -> LiveStatus | None:
        """How the live source is doing; None for other sources."""
        return self.source.status if isinstance(self.source, LiveSource) else None

    def watch(
        self,
        until_seconds: float | None = None,
        on_step: Callable[[Progress], None] | None = None,
        pause: Callable[[], bool] | None = None,
    ) -> None:
        """Prefill the source's frames; in linear time with a bounded carry.

        May be called again to go on. After Ctrl-C or a damaged source, what was seen can still be asked.

        Args:
            until_seconds: stop behind this presentation time; None goes to the end.
            on_step: called after each step.
            pause: asked between frames, and several times a second while a live source shows none; True: stop here.

        Raises:
            ConfigError: the session has no source.
            HorizonError, MemoryLimitError: as `push`.
        """
        self._check_growing()
        if self.source is None:
            raise ConfigError("this session has no source to watch", "push frames, or open it with a file")
        while (frame := self._ahead.draw(self.source, self._waiting, pause)) is not None:
            self.push([frame], on_step)
            if until_seconds is not None and frame.pts_seconds >= until_seconds:
                return

    def push(
        self, frames: Iterable[Frame], on_step: Callable[[Progress], None] | None = None, seen: Seen | None = None
    ) -> None:
        """Let frames enter; they become part of the stream as soon as a step is full.

        `seen` is what the vision tower made of the step that they end, where several streams share it.

        Raises:
            ConfigError: not a frame, or one of another size than its partner in the step; those before it have entered.
            HorizonError: the stream has reached its horizon; what was seen can still be asked.
            MemoryLimitError: out of memory; what was seen can still be asked, but nothing more can enter.
        """
        if seen is not None and not self._only_newest:
            self._ahead.offer(seen)
        for frame in frames:
            self._check_growing()
            check_frame(frame, self._waiting[-1:] if self.stepper.model.frames_per_step > 1 else [])
            with deferred_interrupts():
                self._waiting.append(frame)
                progress = self._pass() if self._only_newest else self._step()
                if progress is not None and on_step is not None:
                    on_step(progress)

    def ask(
        self,
        question: str,
        *,
        max_new_tokens: int | None = None,
        stop: tuple[str, ...] = (),
        do_sample: bool = False,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> str:
        """Answer a question about everything seen so far.

        Args:
            question: the text.
            max_new_tokens: longest answer; None: the configuration's.
            stop: the answer ends before any of these strings.
            do_sample, temperature, top_k, top_p: draw instead of decoding greedily.

        Raises:
            ConfigError: an empty question, one with the model's vision tokens, or nothing seen yet.
            HorizonError: question and answer would pass the stream's horizon.
        """
        drawing = {"do_sample": do_sample, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        sampling = asking.sampling_of(self.stepper, self.state, max_new_tokens, **drawing)
        return "".join(self._answer(question, sampling, stop))

    def stream(
        self,
        question: str,
        *,
        max_new_tokens: int | None = None,
        stop: tuple[str, ...] = (),
        do_sample: bool = False,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> Iterator[str]:
        """As `ask`, piece by piece. Abandoning the iterator ends the answer; nothing may enter before it is done."""
        drawing = {"do_sample": do_sample, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        sampling = asking.sampling_of(self.stepper, self.state, max_new_tokens, **drawing)
        return self._answer(question, sampling, stop)

    def logits(self, question: str) -> torch.Tensor:
        """[streams, vocabulary] float32: what the first token of the answer is chosen from."""
        self._check_askable()
        return asking.first_logits(self.stepper, self.state, self._waiting, question)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the session to a folder, from which `Engine.restore` goes on as if nothing had happened.

        A session that the folder holds already is replaced once this one is whole. Frames that an iterator of the
        user's own has yet to give are not part of it.

        Raises:
            ConfigError: the session is closed, or an answer is being given.
            SaveError: the folder cannot be written, or holds something else; a former save in it is intact.
        """
        self._check_free()
        source = self.source.facts() if isinstance(self.source, Footage) else None
        with deferred_interrupts():
            save_session(folder, self.stepper.model, self.state, self._standing, source)

    def fork(self) -> Session:
        """A second session from here on; neither sees what becomes of the other.

        The detailed cache's memory is shared until both have written behind the common part: the second to do so moves
        to a copy. A file is read on separately; an iterator of the user's own stays with this session.

        Raises:
            ConfigError: the session is closed, or an answer is being given.
        """
        self._check_free()
        source = self.source.again() if isinstance(self.source, Footage) else None
        return Session.resumed(self.stepper, self.state.fork(), self._standing, source)

    def close(self) -> None:
        """Free both memories and the source; may be called twice."""
        close = getattr(self.source, "close", None)
        if close is not None:
            close()
        self.source = None
        self._closed = True
        self._waiting.clear()
        self._ahead.forget()
        self.state.free()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _standing(self) -> Standing:
        ahead, looked = self._ahead.held
        return Standing(self.seconds, self.steps, self._waiting, self._passed, self._broken, ahead, looked)

    def _pass(self) -> Progress | None:
        """Let go of the frame that a newer one pushes out; nothing enters before a question."""
        passed = max(0, len(self._waiting) - self.state.config.last_frames)
        del self._waiting[:passed]
        self._passed += passed
        self.steps = self.frames // self.stepper.model.frames_per_step
        ends_step = self.frames % self.stepper.model.frames_per_step == 0
        newest = self._waiting[-1].pts_seconds
        return Progress(self.steps, self.frames, newest, 0.0, 0, 0, self.live) if ends_step else None

    def _step(self) -> Progress | None:
        if len(self._waiting) < self.stepper.model.frames_per_step:
            return None
        frames = list(self._waiting)
        mark = self.state.mark()
        self._waiting.clear()
        try:
            with torch.inference_mode(), memory_limit():
                began = time.perf_counter()
                entering = self.stepper.enter(self.state, self._ahead.take(frames))
                mark = self.state.mark()  # entering may have moved positions
                seen = time.perf_counter()
                self.seconds.vision += seen - began
                for gap in (frame for frame in frames if frame.gap_seconds):
                    self.state.note("gap", 0, gap.pts_seconds - gap.gap_seconds, uncompacted(self.state, entering[-1]))
                for segment in entering:
                    self.stepper.prefill(self.state, segment)
        except BaseException as error:
            self._step_failed(error, frames, mark.tokens)
            self.state.crop_to(mark)
            raise
        took = time.perf_counter() - seen
        self.seconds.prefill += took
        self.steps += 1
        if self.steps == 1:
            self.stepper.reserve(self.state)
        carried, tokens = self.state.carried.length, self.state.tokens
        return Progress(self.steps, self.state.frames, frames[-1].pts_seconds, took, carried, tokens, self.live)

    def _step_failed(self, error: BaseException, frames: list[Frame], tokens: int) -> None:
        if isinstance(error, StateKVError) and not isinstance(error, MemoryLimitError):
            # Raised before the first layer: nothing has changed, earlier frames go on waiting for a partner.
            self._waiting = frames[:-1]
            return
        # Layers in front of the failure have carried the step already, those behind it have not.
        self._broken = f"a step failed after {tokens} tokens ({type(error).__name__})"

    def _answer(self, question: str, sampling: Sampling, stop: tuple[str, ...]) -> Iterator[str]:
        self._check_askable()
        began = time.perf_counter()
        self._answering = True
        try:
            yield from asking.answer(self.stepper, self.state, self._waiting, question, sampling, stop)
        finally:
            self._answering = False
            self.seconds.answer += time.perf_counter() - began

    def _check_free(self) -> None:
        if self._closed:
            raise ConfigError("this session is closed", "open a new one")
        if self._answering:
            raise ConfigError("an answer is still being given", "finish its iterator, or close it")

    def _check_growing(self) -> None:
        self._check_free()
        if self._broken:
            raise StateKVError(self._broken, "questions still work; open a new session to watch on")

    def _check_askable(self) -> None:
        self._check_free()
        if not self.frames:
            raise ConfigError("nothing has been seen yet", "watch the source or push frames first")
