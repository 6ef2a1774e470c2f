"""What a benchmark is made of: videos, questions about them, and how answers are scored."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

REFERENCE = "full"  # the method that all others are compared with


@dataclass(frozen=True)
class EvalQuestion:
    """One question.

    Attributes:
        id: unique within the task.
        kind: sub-task that accuracies are also reported for.
        prompt: whole text that the model is asked, options and instructions included.
        expected: the right answer: a letter, or the words.
        chance: share that guessing gets.
        at_seconds: asked as soon as the stream has shown this time; None: at the video's end.
        group: a coarser part of the task that the question belongs to, such as a video's length class; or "".
    """

    id: str
    kind: str
    prompt: str
    expected: str
    chance: float
    at_seconds: float | None = None
    group: str = ""


@dataclass(frozen=True)
class EvalVideo:
    """One stream and its questions, in the order in which they are asked.

    Attributes:
        id: unique within the task.
        path: the video's file; its existence is not checked before it is watched.
        questions: sorted by `at_seconds`, None last.
        until_seconds: the stream ends here, as if the video had been cut; None: whole.
    """

    id: str
    path: Path
    questions: tuple[EvalQuestion, ...]
    until_seconds: float | None = None


@dataclass(frozen=True)
class Broken:
    """A record of the data set that cannot be used: which, and why, in one line."""

    id: str
    reason: str


class Task(Protocol):
    """A benchmark; its class is in the table of `statekv.evals`.

    Made with the folder that its data lie in (None: its default place). Making one reads nothing, so that results can
    be reported without the data; `videos` reads.

    Attributes:
        name: as the command line has it.
        variant: what tells two runs of it apart besides settings, such as the length of films; or "".
        settings: of `Config`, that the benchmark prescribes (fps, max_frames, max_new_tokens).
    """

    name: str
    variant: str
    settings: Mapping[str, Any]

    def videos(self) -> Iterator[EvalVideo | Broken]:
        """All videos, always in the same order; records that cannot be used are told, not skipped."""
        ...

    def right(self, question: EvalQuestion, answered: str) -> Mapping[str, bool]:
        """Verdicts on an answer: "score" is the benchmark's own, others are stricter or looser readings."""
        ...

    def headlines(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, float]:
        """The benchmark's figures, shares of 1 by name; the first is the headline.

        Args:
            rows: of questions; `kind`, `group`, and each verdict under its own name (`row["score"]`).
        """
        ...


@runtime_checkable
class Maker(Protocol):
    """A task that makes its own videos."""

    def make(self, video: EvalVideo) -> None:
        """Called before a video is watched; its file is there afterwards."""
        ...


Rows = Sequence[Mapping[str, Any]]


def share(rows: Rows, verdict: str = "score") -> float:
    """Share of rows with a verdict; nan of none."""
    return sum(bool(row[verdict]) for row in rows) / len(rows) if rows else math.nan


def shares(rows: Rows, field: str, verdict: str = "score") -> dict[str, float]:
    """The same for each value of a field, in the order of their first appearance."""
    parts: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        parts.setdefault(row[field], []).append(row)
    return {name: share(part, verdict) for name, part in parts.items()}


def macro_share(rows: Rows, field: str, verdict: str = "score") -> float:
    """Unweighted mean of those; nan of none."""
    parts = shares(rows, field, verdict)
    return sum(parts.values()) / len(parts) if parts else math.nan
