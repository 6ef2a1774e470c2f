"""Methods side by side on the same videos and questions: accuracy, distance to full attention, time, memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np

from statekv.config import Config
from statekv.engine.engine import Engine
from statekv.engine.progress import Progress
from statekv.engine.session import Session
from statekv.errors import writing
from statekv.evals.cards.render import write_film
from statekv.evals.cards.world import FIRST_TEST_SEED, KINDS, Question, questions, write_story
from statekv.evals.data import make_folder
from statekv.video.file import read_frames

REFERENCE = "full"
METHODS = (REFERENCE, "statekv", "statekv_weighted", "recency_window", "streaming_llm", "random")


@dataclass
class MethodResult:
    """What one method did on all videos.

    Attributes:
        right: for each question (kind, text, expected, answered, chance).
        kl: for each question, KL(full ‖ method) of the first answer token, in nats.
        step_ms: for each video, milliseconds of the language model for each step.
        carried, bytes_carried, bytes_detailed: at the end of a video, the largest seen.
    """

    method: str
    rows: list[dict[str, object]] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    step_ms: list[list[float]] = field(default_factory=list)
    carried: int = 0
    bytes_carried: int = 0
    bytes_detailed: int = 0

    def asked(self, kind: str | None = None) -> list[dict[str, object]]:
        """The rows of one kind, or all."""
        return [row for row in self.rows if kind in (None, row["kind"])]

    def accuracy(self, kind: str | None = None) -> float:
        """Share of right answers, of all questions or of one kind; NaN where none was asked."""
        rows = self.asked(kind)
        return sum(row["answered"] == row["expected"] for row in rows) / len(rows) if rows else float("nan")

    def chance(self) -> float:
        """Share that guessing among each kind's answers would get."""
        return float(np.mean([row["chance"] for row in self.rows]))

    def tenth_ms(self, tenth: int) -> float:
        """Median milliseconds per step in one tenth (0 … 9) of the videos."""
        picked: list[float] = []
        for steps in self.step_ms:
            size = len(steps) / 10
            picked += steps[round(tenth * size) : round((tenth + 1) * size)]
        return median(picked) if picked else float("nan")

    def summary(self) -> dict[str, object]:
        """Everything as plain numbers."""
        return {
            "method": self.method,
            "questions": len(self.rows),
            "accuracy": self.accuracy(),
            "chance": self.chance(),
            "accuracy_by_kind": {kind: self.accuracy(kind) for kind in KINDS if self.asked(kind)},
            "kl_to_full": float(np.mean(self.kl)),
            "ms_per_step_tenths": [self.tenth_ms(tenth) for tenth in range(10)],
            "carried_tokens": self.carried,
            "bytes_carried": self.bytes_carried,
            "bytes_detailed": self.bytes_detailed,
        }


def compare(
    engine: Engine,
    folder: Path,
    *,
    videos: int,
    frames: int,
    budget: int,
    per_kind: int = 3,
    first_seed: int = FIRST_TEST_SEED,
    on_video: Callable[[int], None] | None = None,
) -> list[MethodResult]:
    """Watch and question every video with every method.

    All methods step through a video side by side, frame by frame, so that the machine's moods hit them alike; the
    vision tower runs once for all of them.

    Args:
        videos, frames: how many videos, of how many frames at one frame per second.
        per_kind: questions of each kind and video, as far as the story allows.
    """
    make_folder(folder)
    results = [MethodResult(method) for method in METHODS]
    for number in range(videos):
        story = write_story(first_seed + number, float(frames))
        path = folder / f"cards-{number}.mp4"
        write_film(story, path)
        asked = questions(story, np.random.default_rng([story.seed, 3]), per_kind)
        sessions = [engine.open(method=name, **Config.of(name).fitting(budget=budget)) for name in METHODS]
        _watch(path, sessions, results)
        _ask(asked, sessions, results)
        for session in sessions:
            session.close()
        if on_video is not None:
            on_video(number)
    return results


def _watch(path: Path, sessions: Sequence[Session], results: Sequence[MethodResult]) -> None:
    steps: list[list[Progress]] = [[] for _ in sessions]
    for frame in read_frames(path, fps=1.0, ahead=8):
        (seen,) = sessions[0].runner.encode([[frame]], None)
        for session, taken in zip(sessions, steps, strict=True):
            session.push([frame], taken.append, seen=seen)
    for session, result, taken in zip(sessions, results, steps, strict=True):
        result.step_ms.append([1000 * progress.step_seconds for progress in taken])
        result.carried = max(result.carried, session.state.carried.length)
        result.bytes_carried = max(result.bytes_carried, session.state.nbytes["carried"])
        result.bytes_detailed = max(result.bytes_detailed, session.state.nbytes["detailed"])


def _ask(asked: Sequence[Question], sessions: Sequence[Session], results: Sequence[MethodResult]) -> None:
    for question in asked:
        reference = sessions[0].logits(question.text).log_softmax(-1)
        for session, result in zip(sessions, results, strict=True):
            own = session.logits(question.text).log_softmax(-1)
            result.kl.append(float((reference.exp() * (reference - own)).sum()))
            answered = session.ask(question.text, max_new_tokens=8, do_sample=False).strip()
            asked_so = {"kind": question.kind, "question": question.text, "chance": question.chance}
            result.rows.append({**asked_so, "expected": question.answer, "answered": answered})


_SMOOTHED_OVER = 16  # steps


def draw_step_times(results: Sequence[MethodResult], path: Path, title: str) -> None:
    """Write a PNG with one line per method, the median over the videos."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for result in results:
        per_step = np.median(np.asarray(result.step_ms), axis=0)  # [steps]
        pieces = max(1, len(per_step) // _SMOOTHED_OVER)
        smooth = [float(np.median(piece)) for piece in np.array_split(per_step, pieces)]
        steps = [float(piece.mean()) + 1 for piece in np.array_split(np.arange(len(per_step)), pieces)]
        axes.plot(steps, smooth, label=result.method, linewidth=2 if result.method in ("full", "statekv") else 1)
    axes.set(xlabel="step (frame)", ylabel="language model, ms per step", title=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with writing(path):
        figure.savefig(path)
