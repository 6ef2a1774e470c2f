"""One video and its questions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch

from statekv.ahead import Ahead
from statekv.cache.stream import StreamState
from statekv.decoding import Sampling
from statekv.errors import ConfigError, MemoryLimitError, StateKVError
from statekv.interrupts import deferred_interrupts
from statekv.models.base import Seen, Segment
from statekv.progress import Progress, Seconds
from statekv.stepper import Stepper, memory_limit, room_for_answers
from statekv.streaming_text import StreamingText
from statekv.video.frame import Frame

_LABEL_GROWTH = 4  # tokens that the label of a late frame has more than that of the first


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

    @property
    def frames(self) -> int:
        """Pictures seen, also those that still wait: for a partner to make a step, or for a question."""
        return (self._passed if self._only_newest else self.state.frames) + len(self._waiting)

    def watch(self, until_seconds: float | None = None, on_step: Callable[[Progress], None] | None = None) -> None:
        """Prefill the source's frames; in linear time with a bounded carry.

        May be called again to go on. After Ctrl-C or a damaged source, what was seen can still be asked.

        Args:
            until_seconds: stop behind this presentation time; None goes to the end.
            on_step: called after each step.

        Raises:
            ConfigError: the session has no source.
            HorizonError, MemoryLimitError: as `push`.
        """
        self._check_growing()
        if self.source is None:
            raise ConfigError("this session has no source to watch", "push frames, or open it with a file")
        while (frame := self._ahead.draw(self.source, self._waiting)) is not None:
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
            self._check_frame(frame)
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
        sampling = self._sampling(max_new_tokens, **drawing)
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
        return self._answer(question, self._sampling(max_new_tokens, **drawing), stop)

    def logits(self, question: str) -> torch.Tensor:
        """[streams, vocabulary] float32: what the first token of the answer is chosen from."""
        self._check_askable()
        mark = self.state.mark()
        try:
            with torch.inference_mode():
                segment = self._entering_question(question)
                return self.stepper.logits(self.stepper.prefill(self.state, segment, "answer")).float()
        finally:
            self.state.crop_to(mark)

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

    def _pass(self) -> Progress | None:
        """Let go of the frame that a newer one pushes out; nothing enters before a question."""
        passed = max(0, len(self._waiting) - self.state.config.last_frames)
        del self._waiting[:passed]
        self._passed += passed
        self.steps = self.frames // self.stepper.model.frames_per_step
        ends_step = self.frames % self.stepper.model.frames_per_step == 0
        newest = self._waiting[-1].pts_seconds
        return Progress(self.steps, self.frames, newest, 0.0, carried=0, tokens=0) if ends_step else None

    def _step(self) -> Progress | None:
        if len(self._waiting) < self.stepper.model.frames_per_step:
            return None
        frames = list(self._waiting)
        mark = self.state.mark()
        self._waiting.clear()
        try:
            with torch.inference_mode(), memory_limit():
                began = time.perf_counter()
                entering = self.stepper.model.enter(self._ahead.take(frames), self.state)
                seen = time.perf_counter()
                self.seconds.vision += seen - began
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
            self._reserve()
        carried, tokens = self.state.carried.length, self.state.tokens
        return Progress(self.steps, self.state.frames, frames[-1].pts_seconds, took, carried, tokens)

    def _reserve(self) -> None:
        """Where the video's length is known, the detailed cache is allocated once."""
        state = self.state
        if state.frames_expected is None:
            return
        steps = -(-state.frames_expected // self.stepper.model.frames_per_step)
        longest = state.spans[-1].length + _LABEL_GROWTH
        # A video too long for the memory is watched as far as it goes.
        with suppress(MemoryLimitError), memory_limit():
            state.detailed.reserve(state.tokens + (steps - 1) * longest + room_for_answers(state.config))

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
        mark = self.state.mark()
        self._answering = True
        try:
            with torch.inference_mode():
                segment = self._entering_question(question)
            text = StreamingText(self.stepper.model.tokenizer, stop)
            for token, _ in self.stepper.answer(self.state, segment, sampling):
                if token in sampling.end_tokens:
                    break
                yield text.push(token)
                if text.stopped:
                    break
            yield text.rest()
        finally:
            self._answering = False
            self.state.crop_to(mark)
            self.seconds.answer += time.perf_counter() - began

    def _entering_question(self, question: str) -> Segment:
        """The question's segment, after frames that wait have been shown to it.

        Those do not become part of the stream: they are cropped away with the question.
        """
        model, frames = self.stepper.model, self._waiting
        segment = model.question(question, self.state)
        if not frames:
            return segment
        steps = [frames[i : i + model.frames_per_step] for i in range(0, len(frames), model.frames_per_step)]
        # The newest frames alone are a clip of their own, whose steps follow each other.
        expected = len(frames) if self._only_newest else self.state.frames_expected
        for seen in model.look(steps, expected):
            for waiting in model.enter(seen, self.state):
                self.stepper.prefill(self.state, waiting, "carry" if self._only_newest else "peek")
        return model.question(question, self.state)

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

    def _check_frame(self, frame: Frame) -> None:
        if not isinstance(frame, Frame):
            raise ConfigError(f"a {type(frame).__name__} was pushed", "push statekv.Frame(data, pts_seconds)")
        partners = self._waiting[-1:] if self.stepper.model.frames_per_step > 1 else []
        if partners and frame.data.shape != partners[0].data.shape:
            sizes = [tuple(picture.data.shape[1:]) for picture in (*partners, frame)]
            raise ConfigError(f"two frames of one step are {sizes[0]} and {sizes[1]} pixels", "resize them to one size")

    def _sampling(self, max_new_tokens: int | None, **drawing: Any) -> Sampling:
        config = self.state.config
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {max_new_tokens}, but must be at least 1", "raise max_new_tokens")
        longest, ends = max_new_tokens or config.max_new_tokens, self.stepper.model.end_tokens
        return Sampling(longest, ends, seed=config.seed, **drawing)
