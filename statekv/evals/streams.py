"""Several configurations on one video: decoded once, looked at once, asked side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch

from statekv.config import Config
from statekv.engine.engine import Engine
from statekv.errors import StateKVError
from statekv.evals.cost import clip_tokens, flops_of, prefill_flops
from statekv.models.base import Seen
from statekv.runner.memory import memory_limit
from statekv.video.frame import Frame


class Stream:
    """One configuration on one video.

    Args:
        engine: the loaded model.
        path: the video's file.
        config: how it is watched.
        until_seconds: the video ends here; None: whole.

    Attributes:
        session: what it has seen so far.
        tokens: of the video that the last answer could draw on.
        failure: why it goes no further, in one line; "" while it does.
        flops: of the prefills so far, by formula; complete once the stream is closed.

    Raises:
        StateKVError: as `Engine.open`.
    """

    def __init__(self, engine: Engine, path: Path, config: Config, until_seconds: float | None = None) -> None:
        self.engine, self.path, self.config, self.until_seconds = engine, path, config, until_seconds
        self.session = engine.open(path, until_seconds=until_seconds, **vars(config))
        self.failure = ""
        self.flops = self.tokens = 0
        self._newest: Frame | None = None

    @contextmanager
    def trying(self) -> Iterator[None]:
        """What goes wrong inside ends this configuration's part in the video, but nobody else's."""
        try:
            yield
        except StateKVError as error:
            self.failure = str(error)

    def show(self, frame: Frame, seen: Seen | None) -> None:
        """The video's next frame; `seen` where it ends a step that has been looked at.

        Raises:
            StateKVError: as `Session.push`.
        """
        self._newest = frame
        self.session.push([frame], seen=seen)

    def arrive(self, at_seconds: float | None) -> None:
        """Be ready for questions at a time that frames have been shown up to; None: the video's end.

        Raises:
            StateKVError: as `Engine.open` and `Session.watch`.
        """
        if self.config.uniform:  # frames spread over what has been shown until then
            self.close()
            self.session = self.engine.open(self.path, until_seconds=self._cut(at_seconds), **vars(self.config))
            self.session.watch()

    def ask(self, question: str) -> str:
        """The answer.

        Raises:
            StateKVError: as `Session.ask`.
        """
        answer = self.session.ask(question).strip()
        self.tokens = self.session.state.tokens
        if self.config.recall == "last_frames" and self._newest is not None:
            encoded = clip_tokens(self.session, self._newest)
            self.flops += flops_of(self.session, encoded)
            self.tokens = sum(encoded)
        return answer

    def first_token(self, question: str) -> torch.Tensor:
        """[vocabulary] float32 log-probabilities of the answer's first token.

        Raises:
            StateKVError: as `Session.logits`.
        """
        return self.session.logits(question)[0].log_softmax(-1)

    def close(self) -> None:
        """Give the memory back."""
        self.flops += prefill_flops(self.session)
        self.session.close()

    def _cut(self, at_seconds: float | None) -> float | None:
        if at_seconds is None:
            return self.until_seconds
        shown = at_seconds + (1 / self.config.fps if self.config.fps else 0.0)  # the frame at that time is in
        return shown if self.until_seconds is None else min(shown, self.until_seconds)


class Feed:
    """Frames of one video for streams that sample it alike; none of them uniform.

    Args:
        streams: at least one.
    """

    def __init__(self, streams: Sequence[Stream]) -> None:
        self.streams = streams
        source = streams[0].session.source
        assert source is not None
        self._source = source
        # Where there are none but the newest frames, they are looked at when a question comes.
        self._leader = next((s.session for s in streams if s.config.recall != "last_frames"), None)
        self._coming = self._look()

    def advance(self, until_seconds: float | None) -> None:
        """Show frames up to the first at this time or later; None: to the end.

        A video that cannot be read on is the failure of all streams.
        """
        while living := [stream for stream in self.streams if not stream.failure]:
            try:
                frame, seen = next(self._coming, (None, None))
            except StateKVError as error:
                for stream in living:
                    stream.failure = str(error)
                return
            if frame is None:
                return
            for stream in living:
                with stream.trying():
                    stream.show(frame, seen)
            if until_seconds is not None and frame.pts_seconds >= until_seconds:
                return

    def _look(self) -> Iterator[tuple[Frame, Seen | None]]:
        model = self.streams[0].session.stepper.model
        size, batch = model.frames_per_step, 1  # the first step does not wait for a batch, as in a session
        while frames := list(islice(self._source, size * batch)):
            looked = self._looked([frames[i : i + size] for i in range(0, len(frames) - size + 1, size)])
            for number, frame in enumerate(frames, 1):
                yield frame, looked[number // size - 1] if looked and number % size == 0 else None
            batch = self.streams[0].config.vision_batch

    def _looked(self, steps: list[list[Frame]]) -> list[Seen]:
        if self._leader is None or not steps:
            return []
        with torch.inference_mode(), memory_limit():
            return self._leader.stepper.model.look(steps, self._leader.state.frames_expected)
