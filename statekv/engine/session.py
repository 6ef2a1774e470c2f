"""One video and its questions."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from threading import Event, get_ident
from typing import Any, NoReturn

import torch

from statekv.cache.stream import StreamState
from statekv.engine.answer import answering, begin_answer, first_logits
from statekv.engine.awaiting import Awaitable
from statekv.engine.ingest import FrameQueue, PendingStep
from statekv.engine.interrupts import deferred_interrupts
from statekv.engine.progress import Progress, Seconds
from statekv.engine.snapshot import SessionSnapshot, save_session
from statekv.errors import ConfigError, kind_of
from statekv.models.encoded import EncodedStep
from statekv.ops import implementation
from statekv.runner.decoding import SamplingParams
from statekv.runner.lock import FairLock
from statekv.runner.runner import ModelRunner
from statekv.video.frame import Frame
from statekv.video.sampling import FrameSampler
from statekv.video.source import LiveStatus, Source


class Session(Awaitable):
    """A stream that grows frame by frame and can be asked at any time; asking changes nothing.

    Made by `Engine.open`. Any thread may use it at any time: they take turns, in the order in which they came. In an
    event loop `aask`, `astream` and `awatch` leave the loop free meanwhile.

    Args:
        runner: the loaded model.
        state: both memories.
        source: frames that `watch` draws from, any iterable; None where all come through `push`.
        snapshot: where another session stood, which this one goes on from.

    Attributes:
        queue: frames on their way into the stream.
        lock: whoever changes or reads the stream takes it meanwhile.
    """

    def __init__(
        self,
        runner: ModelRunner,
        state: StreamState,
        source: Iterable[Frame] | None = None,
        snapshot: SessionSnapshot | None = None,
    ) -> None:
        self.state = state
        self.queue = FrameQueue(runner, state, source, snapshot or SessionSnapshot())
        self.lock = FairLock()
        self._closed = False
        self._answering: int | None = None  # the thread that gives an answer for which the stream is held
        self._idle = Event()  # nobody gives one
        self._idle.set()
        runner.admission.enter(state)

    def __reduce_ex__(self, _: object) -> NoReturn:
        raise ConfigError("a Session cannot be copied or pickled", "fork it, or save it and restore it elsewhere")

    @property
    def runner(self) -> ModelRunner:
        """The loaded model."""
        return self.queue.runner

    @runner.setter
    def runner(self, runner: ModelRunner) -> None:
        self.queue.runner = runner

    @property
    def source(self) -> Source | None:
        """Frames that `watch` draws from; any iterable of frames may be given."""
        return self.queue.source

    @source.setter
    def source(self, frames: Iterable[Frame] | None) -> None:
        self.queue.source = frames

    @property
    def sampler(self) -> FrameSampler:
        """Which frames are seen."""
        return self.queue.sampler

    @property
    def frames(self) -> int:
        """Pictures seen, also those that still wait: for a partner to make a step, or for a question."""
        return self.queue.frames

    @property
    def steps(self) -> int:
        """Steps that have entered."""
        return self.queue.steps

    @property
    def seconds(self) -> Seconds:
        """Where the time went."""
        return self.queue.seconds

    @property
    def live(self) -> LiveStatus | None:
        """How the live source is doing; None for other sources."""
        return self.queue.live

    @property
    def closed(self) -> bool:
        """Whether it has been closed."""
        return self._closed

    @property
    def answering(self) -> bool:
        """Whether an answer is being given before whose end nothing may enter: where memory has a cap."""
        return self._answering is not None

    def stats(self) -> dict[str, Any]:
        """What the stream is, holds and has cost, in plain numbers and words, as `--json` tells them.

        Returns:
            By name: `method`, `carry`, `recall`, `layout` and `budget` as it was opened; the `kernel` that scores keys,
            and whether steps are replayed (`graph`); `frames`, `steps`, `tokens` of the detailed cache, `carried` ones,
            `positions` of its `horizon`, `compacted` (how many times closer together steps lie), `forgotten` steps;
            `dropped` frames and `gaps` of a live source; `seconds` by work; `bytes` allocated and `bytes_used`.
        """
        state, live = self.state, self.live
        config, spec = state.config, state.spec
        return {
            "method": config.method,
            "carry": config.facts["carry"],
            "recall": config.recall,
            "layout": config.layout,
            "kernel": implementation(config.kernel, spec.devices[0], spec.dtype, spec.head_dim),
            "graph": config.graph and state.bounded is not None and self.runner.graphs.works_on(spec.devices),
            "budget": config.budget,
            "frames": self.frames,
            "steps": self.steps,
            "tokens": state.tokens,
            "carried": state.carried.length,
            "positions": state.position,
            "horizon": state.horizon,
            "compacted": state.compaction.factor,
            "forgotten": state.forgotten,
            "dropped": live.dropped if live is not None else 0,
            "gaps": live.gaps if live is not None else 0,
            "seconds": asdict(self.seconds),
            "bytes": state.nbytes,
            "bytes_used": state.used,
        }

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
        with self._turn(pause) as mine:
            if not mine:
                return
            self.queue.check()
            source = self.queue.drawn()
        while self.queue.ahead.wait(source, pause):
            with self._turn(pause) as mine:
                if not mine:
                    return
                self.queue.check()
                frame = self.queue.draw()
                if frame is not None:
                    self._put(frame, on_step)
                elif self.queue.ended:
                    return
            if frame is not None and until_seconds is not None and frame.pts_seconds >= until_seconds:
                return

    def push(
        self,
        frames: Iterable[Frame],
        on_step: Callable[[Progress], None] | None = None,
        seen: EncodedStep | None = None,
    ) -> None:
        """Let frames enter; they become part of the stream as soon as a step is full, or the next has another size.

        `seen` is what the vision tower made of the step that they end, where several streams share it. Frames that the
        stream's gate keeps out do not enter.

        Raises:
            ConfigError: not a frame, or one from before the stream's first; those before it have entered.
            HorizonError: the stream has reached its horizon; what was seen can still be asked.
            MemoryLimitError: out of memory; what was seen can still be asked, but nothing more can enter.
        """
        if seen is not None and self.sampler.newest is None:
            with self.lock:
                self.queue.ahead.offer(seen)
        if not isinstance(frames, Iterable):
            raise ConfigError(f"{kind_of(frames)} was pushed", "push a list of statekv.Frame(data, pts_seconds)")
        for frame in frames:
            with self._turn():
                self.queue.check()
                if self.queue.ahead.admits(frame):
                    self._put(frame, on_step, lent=seen is None)

    def ask(
        self,
        question: str,
        *,
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        **generation: Any,
    ) -> str:
        """Answer a question about everything seen so far.

        Args:
            question: the text.
            max_new_tokens: longest answer; None: the configuration's.
            stop: the answer ends before any of these strings.
            seed: of the draws, where tokens are drawn; None: torch's global generator.
            generation: transformers' generation parameters (do_sample, temperature, top_k, top_p, min_p,
                repetition_penalty …); those that are not given are the checkpoint's own, as for stock `generate`.

        Raises:
            ConfigError: an empty question, one with the model's vision tokens, nothing seen yet, or a parameter that is
                unknown, outside its range, or that cannot be followed.
            HorizonError: question and answer would pass the stream's horizon.
        """
        return "".join(self.stream(question, max_new_tokens=max_new_tokens, stop=stop, seed=seed, **generation))

    def stream(
        self,
        question: str,
        *,
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        **generation: Any,
    ) -> Generator[str, None, None]:
        """As `ask`, piece by piece. Abandoning the iterator ends the answer.

        It is about what had been seen when its first piece was asked for, whatever enters meanwhile. Where memory has a
        cap nothing may enter before it is done: other threads wait for that, the thread that gives it gets a
        ConfigError.
        """
        sampling, stop = answering(self.runner, self.state, max_new_tokens, stop, seed, generation)
        return self._answer(question, sampling, stop)

    def logits(self, question: str) -> torch.Tensor:
        """[streams, vocabulary] float32: what the first token of the answer is chosen from."""
        with self._turn():
            self._check_seen()
            return first_logits(self.runner, self.state, self.queue.waiting, question)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the session to a folder, from which `Engine.restore` goes on as if nothing had happened.

        A session that the folder holds already is replaced once this one is whole. Frames that an iterator of the
        user's own, or a `PushedSource`, has yet to give are not part of it: they are pushed anew.

        Raises:
            ConfigError: the session is closed, or this thread is giving an answer.
            SaveError: the folder cannot be written, or holds something else; a former save in it is intact.
        """
        with self._turn(), deferred_interrupts():
            source = None if self.source is None else self.source.facts()
            save_session(folder, self.runner.model, self.state, self.queue.snapshot, source)

    def fork(self) -> Session:
        """A second session from here on; neither sees what becomes of the other.

        The detailed cache's memory is shared until both have written behind the common part: the second to do so moves
        to a copy. A file is read on separately; a live source or an iterator of the user's own stays with this session.

        Raises:
            ConfigError: the session is closed, or this thread is giving an answer.
        """
        with self._turn():
            source = None if self.source is None else self.source.fork()
            with self.runner.lock:  # memory is about to be shared
                state = self.state.fork()
            return Session(self.runner, state, source, self.queue.snapshot)

    def close(self) -> None:
        """Free both memories and the source; may be called twice. An answer that is being given ends with an error."""
        self._closed = True
        self._idle.set()
        if (source := self.source) is not None:
            source.close()
        with self.lock, self.runner.lock:
            self.queue.free()
            self.runner.batches.leave(self.state)
            self.runner.admission.leave(self.state)
            self.state.free()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check_growing(self) -> None:
        """Raise the error that pushing a frame would raise: closed, an answer being given, or a step that failed."""
        self._check_open()
        if self.answering:
            _refuse_inside()
        self.queue.check()

    @contextmanager
    def _turn(self, pause: Callable[[], bool] | None = None) -> Iterator[bool]:
        """Have the stream, as soon as no other thread has it or gives an answer; False where `pause` says so before.

        Raises:
            ConfigError: the session is closed, or the answer is this thread's own, or its event loop's.
        """
        while True:
            with self.lock:
                self._check_open()
                if not self.answering:
                    yield True
                    return
                if self._answering == get_ident() or _runs_loop():
                    _refuse_inside()
            while not self._idle.wait(_POLL_SECONDS if pause is not None else None):
                if pause is not None and pause():
                    yield False
                    return

    def _put(self, frame: Frame, on_step: Callable[[Progress], None] | None, lent: bool = False) -> None:
        with deferred_interrupts():
            found = self.queue.put(frame, lent)
            progress = self.queue.take(found) if isinstance(found, PendingStep) else found
            if progress is not None and on_step is not None:
                on_step(progress)

    def _answer(self, question: str, sampling: SamplingParams, stop: Sequence[str]) -> Generator[str, None, None]:
        with self._turn():
            self._check_seen()
            began = time.perf_counter()
            answer = begin_answer(self.runner, self.state, self.queue.waiting, question, sampling, stop)
            if answer.held:
                self._answering = get_ident()
                self._idle.clear()
        try:
            for piece in answer.pieces():
                yield piece
                if answer.held:
                    self._answering = get_ident()  # readers may change
                self._check_open()
        finally:
            answer.close()
            if answer.held:
                self._answering = None
                self._idle.set()
            self.seconds.answer += time.perf_counter() - began

    def _check_open(self) -> None:
        if self._closed:
            raise ConfigError("this session is closed", "open a new one")

    def _check_seen(self) -> None:
        if not self.frames:
            raise ConfigError("nothing has been seen yet", "watch the source or push frames first")


_POLL_SECONDS = 0.1


def _refuse_inside() -> NoReturn:
    raise ConfigError("an answer is still being given", "finish its iterator, or close it")


def _runs_loop() -> bool:
    """Whether this thread has an event loop, which would stand still while it waits."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
