"""What a run will take, from a few steps and one answer on its longest video."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import torch

from statekv.cache.stream import room_for_answers
from statekv.config import Config
from statekv.engine.engine import Engine
from statekv.evals.cost import segment_flops
from statekv.evals.paper.check import Clip
from statekv.evals.runner import Stream
from statekv.models.encoded import EncodedStep
from statekv.runner.memory import carried_bytes, free_bytes, usable
from statekv.video.file import read_frames
from statekv.video.frame import Frame

_WARM, _TIMED = 2, 8  # steps

T = TypeVar("T")


@dataclass(frozen=True)
class Cost:
    """What one method has taken.

    Attributes:
        stream: closed; its configuration counts.
        step_seconds: of the timed steps together.
        step_flops: of the same steps, by formula.
        answer_seconds: of one question.
        carried: bytes of its carried cache at full size.
    """

    stream: Stream
    step_seconds: float
    step_flops: int
    answer_seconds: float
    carried: int


@dataclass(frozen=True)
class Trial:
    """What the first steps of a clip and one answer have taken.

    Attributes:
        clip: the one that was watched.
        prefix: tokens of the prompt before the first step.
        words, patches: tokens of a step: of its text, and of its pictures.
        decode_seconds: for a second of video.
        vision_seconds: for a frame.
        costs: by the configuration's name.
    """

    engine: Engine
    clip: Clip
    prefix: int
    words: int
    patches: int
    decode_seconds: float
    vision_seconds: float
    costs: Mapping[str, Cost]

    def pixels(self, clip: Clip) -> tuple[int, int]:
        """(height, width) that the model sees of a frame."""
        return self.engine.model.size(clip.height, clip.width, clip.frames)

    def share(self, clip: Clip) -> float:
        """Pixels of a frame that the model sees, as a share of those of the trial's."""
        (height, width), (mine, own) = self.pixels(clip), self.pixels(self.clip)
        return height * width / (mine * own)

    def lengths(self, clip: Clip) -> list[int]:
        """Tokens of each step of a clip, the prompt's prefix with the first."""
        steps = -(-clip.frames // self.engine.model.frames_per_step)
        step = self.words + round(self.patches * self.share(clip))
        return [self.prefix + step, *[step] * (steps - 1)]

    def seconds(self, clips: Iterable[Clip]) -> float:
        """About how long these clips will take with all methods side by side."""
        asking = sum(cost.answer_seconds for cost in self.costs.values())
        return sum(self._watching(clip) + len(clip.video.questions) * asking for clip in clips)

    def _watching(self, clip: Clip) -> float:
        lengths, found = self.lengths(clip), clip.seconds * self.decode_seconds
        found += clip.frames * self.vision_seconds * self.share(clip)
        for cost in self.costs.values():
            flops = sum(segment_flops(cost.stream.session, lengths))
            found += cost.step_seconds * flops / max(1, cost.step_flops)
        return found

    def detailed(self, clip: Clip) -> dict[str, int]:
        """Bytes of each method's detailed cache at the end of a clip."""
        token, tokens = self.engine.model.kv_spec().bytes_per_token, sum(self.lengths(clip))
        return {name: token * (tokens + room_for_answers(c.stream.config)) for name, c in self.costs.items()}

    @property
    def carried(self) -> int:
        """Bytes of all methods' carried caches at full size."""
        return sum(cost.carried for cost in self.costs.values())

    def positions(self, clip: Clip) -> int:
        """That the steps of a clip take at most."""
        layout = self.engine.model.prompts[self.engine.config.layout].layout
        return self.engine.model.max_positions(clip.frames, clip.height, clip.width, layout, clip.seconds)


def room(engine: Engine) -> int:
    """Bytes that caches can have beside the weights, which are there already, and activations."""
    return sum(usable(free_bytes(device)) for device in set(engine.model.kv_spec().devices))


def weight_bytes(engine: Engine) -> int:
    """Bytes of the loaded weights."""
    return sum(weight.nbytes for weight in engine.model.model.parameters())


def trial(engine: Engine, clip: Clip, configs: Mapping[str, Config]) -> Trial:
    """Watch the first steps of a clip with every configuration, sized as for the whole, and ask its first question.

    Raises:
        StateKVError: as watching and asking do.
    """
    config = next(iter(configs.values()))
    per_step = engine.model.frames_per_step
    frames, decoding = _timed(engine, lambda: _first_frames(clip, config, (_WARM + _TIMED) * per_step))
    with ExitStack() as stack:
        streams = {name: _open(stack, engine, clip, each) for name, each in configs.items()}
        frames += frames[-1:] * (-len(frames) % per_step)
        steps = [frames[start : start + per_step] for start in range(0, len(frames), per_step)]
        seen, seeing = _see(engine, steps, streams[next(iter(streams))])
        question = clip.video.questions[0].prompt
        costs = {name: _cost(stream, steps, seen, question) for name, stream in streams.items()}
        spans = next(iter(streams.values())).session.state.spans
        tokens = [span.length for span in spans if span.kind == "step"]
        prefix = sum(span.length for span in spans if span.kind == "prefix")
    shown = frames[-1].pts_seconds - frames[0].pts_seconds + frames[-1].duration_seconds
    patches = seen[-1].total
    return Trial(engine, clip, prefix, tokens[-1] - patches, patches, decoding / shown, seeing, costs)


def _open(stack: ExitStack, engine: Engine, clip: Clip, config: Config) -> Stream:
    stream = Stream(engine, clip.video.path, config, clip.video.until_seconds)
    stack.callback(stream.session.close)
    return stream


def _first_frames(clip: Clip, config: Config, count: int) -> list[Frame]:
    coming = read_frames(clip.video.path, config.fps, config.max_frames, until_seconds=clip.video.until_seconds)
    frames = list(islice(coming, count))
    coming.close()
    return frames


def _see(engine: Engine, steps: Sequence[Sequence[Frame]], stream: Stream) -> tuple[list[EncodedStep], float]:
    """What the vision tower makes of the steps, and its seconds for a frame."""
    expected, batch = stream.session.state.frames_expected, stream.config.vision_batch
    engine.runner.encode(steps[:1], expected)  # whatever is made once is made here

    def look() -> list[EncodedStep]:
        starts = range(0, len(steps), batch)
        return [seen for start in starts for seen in engine.runner.encode(steps[start : start + batch], expected)]

    seen, seconds = _timed(engine, look)
    return seen, seconds / sum(map(len, steps))


def _cost(stream: Stream, steps: Sequence[Sequence[Frame]], seen: Sequence[EncodedStep], question: str) -> Cost:
    engine, session, warm = stream.engine, stream.session, min(_WARM, len(steps) - 1)

    def push(start: int, stop: int) -> None:
        for frames, encoded in zip(steps[start:stop], seen[start:stop], strict=True):
            session.push(frames, seen=encoded)

    def ask() -> None:
        stream.first_token(question)  # as a run does, which compares the methods by it
        stream.ask(question)

    push(0, warm)
    _, stepping = _timed(engine, lambda: push(warm, len(steps)))
    ask()
    _, asking = _timed(engine, ask)
    lengths = [span.length for span in session.state.spans if span.kind == "step"]
    flops = segment_flops(session, lengths)
    return Cost(stream, stepping, sum(flops[warm:]), asking, carried_bytes(session.state))


def _timed(engine: Engine, work: Callable[[], T]) -> tuple[T, float]:
    """What the work returns, and its seconds until the device is done with it."""
    _wait(engine)
    began = time.perf_counter()
    found = work()
    _wait(engine)
    return found, time.perf_counter() - began


def _wait(engine: Engine) -> None:
    for device in set(engine.model.kv_spec().devices):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
