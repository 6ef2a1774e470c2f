"""A task with one or several configurations: one prefill for each video and configuration serves all its questions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch

from statekv.config import Config
from statekv.engine.engine import Engine
from statekv.errors import StateKVError
from statekv.evals.cost import clip_tokens, flops_of, prefill_flops
from statekv.evals.results import Header, Line, ResultFile, Shard, file_name
from statekv.evals.task import REFERENCE, Broken, EvalQuestion, EvalVideo, Maker, Task
from statekv.models.encoded import EncodedStep
from statekv.video.frame import Frame


def evaluate(
    engine: Engine,
    task: Task,
    configs: Mapping[str, Config],
    out: Path,
    *,
    model: str,
    revision: str | None = None,
    shard: Shard | None = None,
    most: int | None = None,
    on_video: Callable[[str, Mapping[str, str]], None] | None = None,
) -> None:
    """Answer a task's questions with every configuration, and write what came of it.

    All configurations go through a video side by side. A video whose results are complete is not watched again.

    Args:
        configs: by name; the one named "full" is what the others are compared with.
        model, revision: how the checkpoint was named.
        shard: which videos; None: all.
        most: so many of the task's first videos; None: all.
        on_video: called after each video with its id, and by configuration's name why it failed, where it did.

    Raises:
        ConfigError: result files that are of another run, unreadable, or cannot be written.
    """
    shard = shard or Shard()
    files = {}
    for name, config in configs.items():
        header = _header(engine, task, config, model, revision, shard)
        files[name] = ResultFile(out / file_name(name, shard), header)
    for video in shard.of(distinct_videos(islice(task.videos(), most))):
        missing = [name for name, file in files.items() if video.id not in file.done]
        if not missing:
            continue
        # Distances from the reference need it at their side, also where its own results are there.
        wanted = {name: config for name, config in configs.items() if name in missing or name == REFERENCE}
        found = watch(engine, task, video, wanted)
        failures = {name: found[name][-1]["reason"] for name in missing if found[name][-1]["type"] == "failed"}
        for name in missing:
            if name not in failures or failures[name] != files[name].failed.get(video.id):
                files[name].append(found[name])
        if on_video is not None:
            on_video(video.id, failures)


def watch(
    engine: Engine, task: Task, video: EvalVideo | Broken, configs: Mapping[str, Config]
) -> dict[str, list[Line]]:
    """One video with several configurations, side by side.

    Returns:
        By configuration's name the lines of its result file: questions, and the one that closes the video.
    """
    if isinstance(video, Broken):
        return {name: [_failed(video.id, video.reason)] for name in configs}
    streams: dict[str, Stream] = {}
    lines: dict[str, list[Line]] = {name: [] for name in configs}
    try:
        for name, config in configs.items():
            try:
                if isinstance(task, Maker):
                    task.make(video)
                streams[name] = Stream(engine, video.path, config, video.until_seconds)
            except StateKVError as error:
                lines[name] = [_failed(video.id, str(error))]
        _go_through(task, video, streams, lines)
    finally:
        for stream in streams.values():
            stream.close()
    for name, stream in streams.items():
        lines[name] = [_failed(video.id, stream.failure)] if stream.failure else [*lines[name], _closing(video, stream)]
    return lines


def _go_through(task: Task, video: EvalVideo, streams: Mapping[str, Stream], lines: Mapping[str, list[Line]]) -> None:
    sampled: dict[tuple[float | None, int | None], list[Stream]] = {}
    for stream in streams.values():
        if not stream.session.sampler.uniform:
            sampled.setdefault((stream.config.fps, stream.config.max_frames), []).append(stream)
    feeds = [FrameQueue(alike) for alike in sampled.values()]
    for at_seconds, asked in groupby(video.questions, lambda question: question.at_seconds):
        for feed in feeds:
            feed.advance(at_seconds)
        for stream in streams.values():
            if not stream.failure:
                with stream.trying():
                    stream.arrive(at_seconds)
        for question in asked:
            _ask(task, video, question, {name: s for name, s in streams.items() if not s.failure}, lines)


def _ask(
    task: Task, video: EvalVideo, question: EvalQuestion, streams: Mapping[str, Stream], lines: Mapping[str, list[Line]]
) -> None:
    reference, expected = None, ""
    for name in sorted(streams, key=lambda name: name != REFERENCE):
        stream, compared = streams[name], {}
        with stream.trying():
            answered = stream.ask(question.prompt)
            if name == REFERENCE:
                reference, expected = stream.first_token(question.prompt), answered
            if reference is not None:
                own = reference if name == REFERENCE else stream.first_token(question.prompt)
                compared = {"kl": float((reference.exp() * (reference - own)).sum()), "agrees": answered == expected}
            lines[name].append(_row(task, video, question, stream, answered) | compared)


def _row(task: Task, video: EvalVideo, question: EvalQuestion, stream: Stream, answered: str) -> dict[str, Any]:
    return {
        "type": "question",
        "video": video.id,
        "id": question.id,
        "kind": question.kind,
        "group": question.group,
        "at_seconds": question.at_seconds,
        "frames": stream.session.frames,
        "tokens": stream.tokens,
        "expected": question.expected,
        "answered": answered,
        "chance": question.chance,
        **task.right(question, answered),
    }


def _closing(video: EvalVideo, stream: Stream) -> Line:
    seconds = stream.session.seconds
    return {
        "type": "video",
        "video": video.id,
        "questions": len(video.questions),
        "prefill_flops": stream.flops,
        "prefill_seconds": round(seconds.prefill, 3),
        "answer_seconds": round(seconds.answer, 3),
    }


def _failed(video: str, reason: str) -> Line:
    return {"type": "failed", "video": video, "reason": " ".join(reason.split())}


def distinct_videos(videos: Iterable[EvalVideo | Broken]) -> Iterator[EvalVideo | Broken]:
    """Videos as they come; one whose id, or whose question's id, has been there before is told and not watched."""
    videos_seen: set[str] = set()
    questions_seen: set[str] = set()
    for number, video in enumerate(videos):
        questions = [question.id for question in video.questions] if isinstance(video, EvalVideo) else []
        twice = [name for name in questions if name in questions_seen or questions.count(name) > 1]
        if video.id in videos_seen:
            yield Broken(f"{video.id} (record {number})", f"a video with the id {video.id} has been there before")
        elif twice:
            yield Broken(video.id, f"a question with the id {twice[0]} has been there before")
        else:
            yield video
        videos_seen.add(video.id)
        questions_seen.update(questions)


def _header(engine: Engine, task: Task, config: Config, model: str, revision: str | None, shard: Shard) -> Header:
    loaded, part = engine.model.model, f"{shard.index}/{shard.count}"
    kind, device = str(loaded.dtype).removeprefix("torch."), loaded.device.type
    return Header(task.name, task.variant, model, revision, kind, device, config.facts, part)


class Stream:
    """One configuration on one video.

    Args:
        until_seconds: the video ends here; None: whole.

    Attributes:
        session: what it has seen so far.
        tokens: of the video that the last answer could draw on.
        failure: why it goes no further, in one line; "" while it does.
        flops: of the prefills so far, by formula; complete once the stream is closed.

    Raises:
        StateKVError: as `Engine.open`; its methods, as those of `Session`.
    """

    def __init__(self, engine: Engine, path: Path, config: Config, until_seconds: float | None = None) -> None:
        self.engine, self.path, self.config, self.until_seconds = engine, path, config, until_seconds
        self.session = engine.open(path, until_seconds=until_seconds, **config.opening)
        self.failure = ""
        self.flops = self.tokens = 0

    @contextmanager
    def trying(self) -> Iterator[None]:
        """What goes wrong inside ends this configuration's part in the video, but nobody else's."""
        try:
            yield
        except StateKVError as error:
            self.failure = str(error)

    def arrive(self, at_seconds: float | None) -> None:
        """Be ready for questions at a time that frames have been shown up to; None: the video's end."""
        if self.session.sampler.uniform:  # frames spread over what has been shown until then
            self.close()
            self.session = self.engine.open(self.path, until_seconds=self._cut(at_seconds), **self.config.opening)
            self.session.watch()

    def ask(self, question: str) -> str:
        """The answer to a question."""
        answer = self.session.ask(question, do_sample=False).strip()
        self.tokens = self.session.state.tokens
        if self.session.sampler.newest is not None:
            encoded = clip_tokens(self.session)
            self.flops += flops_of(self.session, encoded)
            self.tokens = sum(encoded)
        return answer

    def first_token(self, question: str) -> torch.Tensor:
        """[vocabulary] float32 log-probabilities of the answer's first token."""
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


class FrameQueue:
    """Frames of one video for streams that sample it alike; none of them uniform."""

    def __init__(self, streams: Sequence[Stream]) -> None:
        self.streams = streams
        source = streams[0].session.source
        assert source is not None
        self._source = source
        # Where there are none but the newest frames, they are looked at when a question comes.
        self._leader = next((s.session for s in streams if s.session.sampler.newest is None), None)
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
                    stream.session.push([frame], seen=seen)
            if until_seconds is not None and frame.pts_seconds >= until_seconds:
                return

    def _look(self) -> Iterator[tuple[Frame, EncodedStep | None]]:
        """Frames, with what was made of the step that they end, where it has been looked at."""
        model = self.streams[0].session.runner.model
        size, batch = model.frames_per_step, 1  # the first step does not wait for a batch, as in a session
        while frames := list(islice(self._source, size * batch)):
            steps, leader = [frames[i : i + size] for i in range(0, len(frames) - size + 1, size)], self._leader
            looked = leader.runner.encode(steps, leader.state.frames_expected) if leader is not None and steps else []
            for number, frame in enumerate(frames, 1):
                yield frame, looked[number // size - 1] if looked and number % size == 0 else None
            batch = self.streams[0].config.vision_batch
