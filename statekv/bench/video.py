"""A video from file to memory: seconds of video per second, where the time goes, overlapped against in line."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from statekv.bench.harness import Panel, Row, Setting, wait
from statekv.engine.engine import Engine
from statekv.engine.progress import Progress
from statekv.errors import VideoError
from statekv.video.file import read_frames
from statekv.video.frame import Frame
from statekv.video.prefetch import prefetch

SEQUENTIAL, OVERLAPPED = "sequential", "overlapped"
PARTS = ("decode", "vision", "prefill", "waiting")


class Timed:
    """An iterator that knows how long its items took to make, on whichever thread that was."""

    def __init__(self, frames: Iterator[Frame]) -> None:
        self._frames = frames
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Frame]:
        return self

    def __next__(self) -> Frame:
        began = time.perf_counter()
        try:
            return next(self._frames)
        finally:
            self.seconds += time.perf_counter() - began


@dataclass
class Watch:
    """One pass over the video, all in seconds.

    Attributes:
        total: from the first frame asked for to the last one in memory.
        parts: decode, vision, prefill, waiting. In line, the model waits as long as decoding takes, which then is
            not called waiting; overlapped, decoding runs beside the others and only `waiting` holds them up.
        course: (seconds of work, seconds of video) behind each step.
    """

    total: float
    parts: dict[str, float]
    frames: int
    course: list[tuple[float, float]] = field(default_factory=list)

    @property
    def video_seconds(self) -> float:
        """Length of what entered: times between frames, and one more for the last frame."""
        seen = [pts for _, pts in self.course]
        last = seen[-1] - seen[0]
        return last + last / max(1, len(seen) - 1)


def measure(engine: Engine, file: Path, runs: int) -> tuple[list[Row], list[Panel]]:
    """Watch a file in line and overlapped, in turns.

    Returns:
        Rows: seconds of video per second, then ms per frame in all and of each part. The floor is the longer of
        decoding and the model's work, as if they overlapped perfectly. The picture: video against work of the last
        pass of each kind.

    Raises:
        VideoError: the file cannot be read, or holds fewer than two steps.
    """
    passes: dict[str, list[Watch]] = {SEQUENTIAL: [], OVERLAPPED: []}
    for _ in range(1 + runs):
        for kind, done in passes.items():
            done.append(watch(engine, file, overlapped=kind == OVERLAPPED))
    timed = {kind: done[1:] for kind, done in passes.items()}
    config = engine.config
    setting: Setting = {
        "file": file.name,
        "frames": timed[OVERLAPPED][0].frames,
        "method": config.method,
        "budget": config.budget,
        "prefetch": config.prefetch,
        "vision_batch": config.vision_batch,
    }
    lines = {kind: done[-1].course for kind, done in timed.items()}
    return _rows(timed, setting), [Panel(file.name, "seconds of work", "seconds of video", lines)]


def watch(engine: Engine, file: Path, *, overlapped: bool) -> Watch:
    """One pass over a video.

    Args:
        overlapped: decode ahead on a thread, as `Engine.open` does; otherwise in line, frame by frame.

    Raises:
        VideoError: the file cannot be read, or holds fewer than two steps.
    """
    config = engine.config
    course: list[tuple[float, float]] = []
    with engine.open(file) as session:
        decoded = Timed(read_frames(file, config.fps, config.max_frames))
        session.source = prefetch(decoded, config.prefetch) if overlapped else decoded
        began = time.perf_counter()

        def note(progress: Progress) -> None:
            course.append((time.perf_counter() - began, progress.pts_seconds))

        session.watch(on_step=note)
        wait(engine.model.model.device)
        total = time.perf_counter() - began
        seconds = session.seconds
        waiting = seconds.decode if overlapped else 0.0
        parts = {"decode": decoded.seconds, "vision": seconds.vision, "prefill": seconds.prefill, "waiting": waiting}
        if len(course) < 2:
            raise VideoError(f"{file} holds {session.frames} frames at this rate", "give a longer video or more fps")
        return Watch(total, parts, session.frames, course)


def _rows(timed: dict[str, list[Watch]], setting: Setting) -> list[Row]:
    in_line = timed[SEQUENTIAL]
    work = median(done.parts["vision"] + done.parts["prefill"] for done in in_line)
    floor = max(work, median(done.parts["decode"] for done in in_line))
    rate = tuple((kind, tuple(done.video_seconds / done.total for done in watched)) for kind, watched in timed.items())
    rows = [Row("video", kind, setting, "video s/s", samples) for kind, samples in rate]
    for kind, watched in timed.items():
        for part in ("all", *PARTS):
            samples = tuple(
                1000 * (done.total if part == "all" else done.parts[part]) / done.frames for done in watched
            )
            least = 1000 * floor / in_line[0].frames if part == "all" else None
            rows.append(Row("video", kind, {**setting, "part": part}, "ms/frame", samples, least))
    return rows
