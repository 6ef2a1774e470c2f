"""MLVU's multiple-choice questions, dev set, as lmms-eval's task `mlvu_dev` asks and scores them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from statekv.evals.data import DataSet, Record, gathered
from statekv.evals.scoring import chosen_letter, letter_before_bracket, sole_letter
from statekv.evals.task import Broken, EvalQuestion, EvalVideo, Rows, macro_share, share, shares

TASK_TYPES = ("anomaly_reco", "count", "ego", "needle", "order", "plotQA", "topic_reasoning")
_CLOSING = "\nOnly give the best option.\nBest option: ("
_LETTERS = "ABCD"
_DATA = DataSet(
    repository="sy1998/MLVU_dev",
    patterns=("mlvu/test-*.parquet", "test*.parquet", "test*.jsonl", "test*.json"),
    needed={**dict.fromkeys(("video_name", "task_type", "question", "answer"), str), "candidates": list},
)


class MLVU:
    """Unweighted mean of the accuracies of seven task types, which are the kinds.

    Records have no id; a question is known by the number of its record. Verdicts: "score" is lmms-eval's reading since
    0.7.2, "letter" the strict one, "early" lmms-eval's up to 0.7.1, which takes "A." for no letter.
    """

    name = "mlvu"
    variant = ""
    data = _DATA
    settings: Mapping[str, Any] = {"fps": 1.0, "max_frames": 512, "max_new_tokens": 16}

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or Path("statekv-eval", self.name)

    def videos(self) -> Iterator[EvalVideo | Broken]:
        yield from gathered(self.folder, self.data.read(self.folder), "video_name", _question)

    def right(self, question: EvalQuestion, answered: str) -> Mapping[str, bool]:
        early = letter_before_bracket(answered)
        readings = {"score": chosen_letter(answered), "letter": sole_letter(answered), "early": early}
        return {name: letter == question.expected for name, letter in readings.items()}

    def headlines(self, rows: Rows) -> Mapping[str, float]:
        # lmms-eval divides by seven also where a type is missing; on the whole set that is the same.
        means = {"mean of task types": macro_share(rows, "kind"), "mean of questions": share(rows)}
        return {**means, **shares(rows, "kind")}


def _question(record: Record) -> EvalQuestion | Broken:
    fields = record.fields
    kind, answer, options = fields["task_type"], fields["answer"], fields["candidates"]
    if kind not in TASK_TYPES:
        return Broken(record.where, f"has the task type {kind!r}, but the dev set knows {', '.join(TASK_TYPES)}")
    if answer not in list(_LETTERS[: len(options)]):
        return Broken(record.where, f"has the answer {answer!r} to {len(options)} candidates")
    prompt = fields["question"] + _CLOSING  # the options stand in the question
    return EvalQuestion(f"{kind}-{record.number}", kind, prompt, answer, chance=1 / len(options))
