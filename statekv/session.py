"""One video and its questions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType

import torch

from statekv.cache.stream import StreamState
from statekv.decoding import Sampling
from statekv.errors import ConfigError, MemoryLimitError, StateKVError
from statekv.interrupts import deferred_interrupts
from statekv.stepper import Stepper
from statekv.streaming_text import StreamingText
from statekv.video.frame import Frame


@dataclass
class Seconds:
    """Where the time went, in seconds. On a GPU the host runs ahead, so that waiting shows up where it ends."""

    decode: float = 0.0
    vision: float = 0.0
    prefill: float = 0.0
    answer: float = 0.0


@dataclass(frozen=True)
class Progress:
    """Sent after each step.

    Attributes:
        step: number of the step, from 1.
        frames: pictures so far.
        pts_seconds: time of the newest one.
        step_seconds: how long the language model took.
        carried: tokens that go on to the next step.
        tokens: tokens in the detailed cache.
    """

    step: int
    frames: int
    pts_seconds: float
    step_seconds: float
    carried: int
    tokens: int


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
    _broken: str = ""
    _answering: bool = False

    @property
    def frames(self) -> int:
        """Pictures seen, also one that still waits for its partner to make a step."""
        return self.state.frames + len(self._waiting)

    def watch(self, until_seconds: float | None = None, on_step: Callable[[Progress], None] | None = None) -> None:
        """Prefill the source's frames; in linear time with a bounded carry.

        May be called again to go on. After Ctrl-C or a damaged source, what was seen can still be asked.

        Args:
            until_seconds: stop behind this presentation time; None goes to the end.
            on_step: called after each step.

        Raises:
            ConfigError: the session has no source.
        """
        if self.source is None:
            raise ConfigError("this session has no source to watch", "push frames, or open it with a file")
        while True:
            began = time.perf_counter()
            frame = next(self.source, None)
            self.seconds.decode += time.perf_counter() - began
            if frame is None:
                return
            self.push([frame], on_step)
            if until_seconds is not None and frame.pts_seconds >= until_seconds:
                return

    def push(self, frames: Iterable[Frame], on_step: Callable[[Progress], None] | None = None) -> None:
        """Let frames enter; they become part of the stream as soon as a step is full.

        Raises:
            HorizonError: the stream has reached its horizon; what was seen can still be asked.
            MemoryLimitError: out of memory; what was seen can still be asked, but nothing more can enter.
        """
        for frame in frames:
            if self._broken:
                raise StateKVError(self._broken, "questions still work; open a new session to watch on")
            self._check_idle()
            with deferred_interrupts():
                self._waiting.append(frame)
                if len(self._waiting) == self.stepper.model.frames_per_step:
                    progress = self._step()
                    if on_step is not None:
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
        sampling = self._sampling(max_new_tokens, do_sample, temperature, top_k, top_p)
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
        return self._answer(question, self._sampling(max_new_tokens, do_sample, temperature, top_k, top_p), stop)

    def logits(self, question: str) -> torch.Tensor:
        """[streams, vocabulary] float32: what the first token of the answer is chosen from."""
        self._check_idle()
        mark = self.state.mark()
        try:
            with torch.inference_mode():
                self._peek()
                segment = self.stepper.model.question(question, self.state)
                return self.stepper.logits(self.stepper.prefill(self.state, segment, "answer")).float()
        finally:
            self.state.crop_to(mark)

    def close(self) -> None:
        """Free both memories and the source; may be called twice."""
        close = getattr(self.source, "close", None)
        if close is not None:
            close()
        self.source = None
        self._broken = "this session is closed"
        self._waiting.clear()
        self.state.free()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _step(self) -> Progress:
        frames = list(self._waiting)
        mark = self.state.mark()
        self._waiting.clear()
        try:
            with torch.inference_mode():
                began = time.perf_counter()
                entering = self.stepper.model.enter(frames, self.state)
                seen = time.perf_counter()
                self.seconds.vision += seen - began
                for segment in entering:
                    self.stepper.prefill(self.state, segment)
        except BaseException as error:
            self._step_failed(error, mark.tokens)
            self.state.crop_to(mark)
            raise
        took = time.perf_counter() - seen
        self.seconds.prefill += took
        self.steps += 1
        return Progress(
            self.steps,
            self.state.frames,
            frames[-1].pts_seconds,
            took,
            self.state.carried.length,
            self.state.tokens,
        )

    def _check_idle(self) -> None:
        if self._answering:
            raise ConfigError("an answer is still being given", "finish its iterator, or close it")

    def _step_failed(self, error: BaseException, tokens: int) -> None:
        # Layers in front of the failure have carried the step already, those behind it have not. Errors that are
        # raised before the first layer leave nothing behind.
        if isinstance(error, MemoryLimitError) or not isinstance(error, StateKVError):
            self._broken = f"a step failed after {tokens} tokens ({type(error).__name__})"

    def _answer(self, question: str, sampling: Sampling, stop: tuple[str, ...]) -> Iterator[str]:
        self._check_idle()
        model = self.stepper.model
        began = time.perf_counter()
        mark = self.state.mark()
        self._answering = True
        try:
            with torch.inference_mode():
                segment = model.question(question, self.state)
                if not self.frames:
                    raise ConfigError("nothing has been seen yet", "watch the source or push frames first")
                if self._peek():
                    segment = model.question(question, self.state)
            text = StreamingText(model.tokenizer, stop)
            for token, _ in self.stepper.answer(self.state, segment, sampling):
                if token in sampling.end_tokens:
                    break
                yield text.push(token)
                if text.stopped:
                    return
            yield text.rest()
        finally:
            self._answering = False
            self.state.crop_to(mark)
            self.seconds.answer += time.perf_counter() - began

    def _peek(self) -> bool:
        """Show frames that wait for a full step to the question, without making them part of the stream."""
        if not self._waiting:
            return False
        for segment in self.stepper.model.enter(self._waiting, self.state):
            self.stepper.prefill(self.state, segment, "peek")
        return True

    def _sampling(
        self,
        max_new_tokens: int | None,
        do_sample: bool,
        temperature: float | None,
        top_k: int | None,
        top_p: float | None,
    ) -> Sampling:
        config = self.state.config
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {max_new_tokens}, but must be at least 1", "raise max_new_tokens")
        return Sampling(
            max_new_tokens or config.max_new_tokens,
            self.stepper.model.end_tokens,
            do_sample,
            temperature,
            top_k,
            top_p,
            seed=config.seed,
        )
