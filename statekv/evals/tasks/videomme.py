"""Video-MME without subtitles, as lmms-eval's task `videomme` asks and scores it: 2,700 questions, 900 videos."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from statekv.evals.data import DataSet, Record, distinct, gathered
from statekv.evals.scoring import chosen_letter, first_letter, sole_letter
from statekv.evals.task import Broken, EvalQuestion, EvalVideo, Rows, share, shares

# It speaks of subtitles although there are none: that is the task.
_INTRODUCTION = (
    "Select the best answer to the following multiple-choice question based on the video and the subtitles. "
    "Respond with only the letter (A, B, C, or D) of the correct option."
)
_CLOSING = "\nAnswer with the option's letter from the given choices directly."
_LETTERS = "ABCD"
_DATA = DataSet(
    repository="lmms-lab/Video-MME",
    patterns=("videomme/test-*.parquet", "test*.parquet", "test*.jsonl", "test*.json"),
    needed=dict.fromkeys(("question_id", "videoID", "duration", "domain", "question", "answer"), str)
    | {"options": list},
)


class VideoMME:
    """Accuracy over all questions; kinds are the six domains, groups the length classes short, medium and long.

    Verdicts: "score" is lmms-eval's reading since 0.7.2, "letter" the strict one, "early" lmms-eval's up to 0.7.1.
    """

    name = "videomme"
    variant = ""
    data = _DATA
    settings: Mapping[str, Any] = {"fps": 1.0, "max_frames": 512, "max_new_tokens": 16}

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or Path("statekv-eval", self.name)

    def videos(self) -> Iterator[EvalVideo | Broken]:
        yield from gathered(self.folder, distinct(self.data.read(self.folder), "question_id"), "videoID", _question)

    def right(self, question: EvalQuestion, answered: str) -> Mapping[str, bool]:
        readings = {"score": chosen_letter(answered), "letter": sole_letter(answered), "early": first_letter(answered)}
        return {name: letter == question.expected for name, letter in readings.items()}

    def headlines(self, rows: Rows) -> Mapping[str, float]:
        return {"accuracy": share(rows), **shares(rows, "group"), **shares(rows, "kind")}


def _question(record: Record) -> EvalQuestion | Broken:
    fields = record.fields
    options, answer = fields["options"], fields["answer"]
    if answer not in list(_LETTERS[: len(options)]):
        return Broken(record.where, f"has the answer {answer!r} to {len(options)} options")
    prompt, chance = "\n".join((_INTRODUCTION, fields["question"], *options, _CLOSING)), 1 / len(options)
    return EvalQuestion(fields["question_id"], fields["domain"], prompt, answer, chance, group=fields["duration"])
