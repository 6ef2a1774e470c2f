"""OVO-Bench, real-time perception and backward tracing: questions about what a video has shown until they are asked.

Prompt and scoring are those of the benchmark's own code and of lmms-eval's tasks `ovo_realtime` and `ovo_backward`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from statekv.evals.data import DataSet, Record, VideoFiles, distinct, fault
from statekv.evals.scoring import sole_letter
from statekv.evals.task import Broken, EvalQuestion, EvalVideo, Rows, macro_share, share, shares

REALTIME = ("OCR", "ACR", "ATR", "STU", "FPD", "OJR")
BACKWARD = ("EPM", "ASI", "HLD")
FORWARD = ("REC", "SSR", "CRR")

_CHUNKS = "chunked_videos/"
_FPS, _MOST_FRAMES = 1.0, 512
_LONGEST_GAP_SECONDS = 0.1  # between frames of a source video
_SLACK_SECONDS = 2e-3  # within which containers round times
_NEEDED: Mapping[str, type] = {"realtime": float, "question": str, "options": list, "gt": int}


class OVOBench:
    """Accuracy for each sub-task, then their unweighted mean; beside it that of all questions, for both are published.

    Verdicts: "score" is the benchmark's, which looks for the right capital letter anywhere in the answer, so that "An
    apple" is right wherever A is; "letter" is the strict one.

    The benchmark cuts each video where the question is asked. Where those cuts are in the folder (`chunked_videos`,
    named by the questions' ids), each is a stream of its own. From source videos, questions share a stream as far
    as a cut would be sampled at the same frames, and are asked while it goes on. Pictures and positions may then be
    sized for the whole stream, not for the cut.
    """

    name: str
    part: str  # folder of its records in the Hugging Face data set
    tasks: tuple[str, ...]  # its sub-tasks
    variant = ""
    settings: Mapping[str, Any] = {"fps": _FPS, "max_frames": _MOST_FRAMES, "max_new_tokens": 128}

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or Path("statekv-eval", "ovo")
        self.data = DataSet(
            repository="kcz358/OVOBench",
            patterns=(*(f"{self.part}/*.{kind}" for kind in ("parquet", "jsonl", "json")), "ovo_bench_new.json"),
            needed={"id": int, "task": str, "video": str},
        )

    def videos(self) -> Iterator[EvalVideo | Broken]:
        asked: list[tuple[str, EvalQuestion]] = []
        for record in distinct(self.data.read(self.folder), "id"):
            question = _question(record, self.tasks) if isinstance(record, Record) else record
            if isinstance(record, Record) and isinstance(question, EvalQuestion):
                asked.append((record.fields["video"], question))
            elif isinstance(question, Broken):
                yield question
        files = VideoFiles(self.folder)
        if any(files.find(_CHUNKS + question.id) for _, question in asked):
            for _, question in asked:
                yield files.video(_CHUNKS + question.id, (replace(question, at_seconds=None),), id=question.id)
        else:
            yield from _streams(files, asked)

    def right(self, question: EvalQuestion, answered: str) -> Mapping[str, bool]:
        return {"score": question.expected in answered, "letter": sole_letter(answered) == question.expected}

    def headlines(self, rows: Rows) -> Mapping[str, float]:
        means = {"mean of sub-tasks": macro_share(rows, "kind"), "mean of questions": share(rows)}
        strict = {"mean, strict letter": macro_share(rows, "kind", "letter")}
        return {**means, **strict, **shares(rows, "kind")}


class OVORealtime(OVOBench):
    """Real-time visual perception."""

    name, part, tasks = "ovo_realtime", "realtime", REALTIME


class OVOBackward(OVOBench):
    """Backward tracing."""

    name, part, tasks = "ovo_backward", "backward", BACKWARD


def _question(record: Record, tasks: tuple[str, ...]) -> EvalQuestion | Broken | None:
    """The question, with `at_seconds` where the benchmark cuts the video; None: it belongs to another part."""
    kind = record.fields["task"]
    if kind not in tasks and kind in (*REALTIME, *BACKWARD, *FORWARD):
        return None
    reason = fault(record.fields, _NEEDED) if kind in tasks else f"has the unknown task {kind!r}"
    if reason:
        return Broken(record.where, reason)
    options, right, cut = (record.fields[name] for name in ("options", "gt", "realtime"))
    if not 0 <= right < len(options):
        return Broken(record.where, f"has gt {right}, but {len(options)} options")
    if not 0 < cut < math.inf:
        return Broken(record.where, f"is asked at {cut} s, where there is no frame before")
    id, prompt = str(record.fields["id"]), _prompt(record.fields["question"], options)
    return EvalQuestion(id, kind, prompt, _letter(right), chance=1 / len(options), at_seconds=float(cut))


def _prompt(question: str, options: list[str]) -> str:
    lettered = "; ".join(f"{_letter(number)}. {option}" for number, option in enumerate(options))
    return (
        f"\nQuestion: {question}\nOptions:\n{lettered};\n\n"
        "Respond only with the letter corresponding to your chosen option (e.g., A, B, C). \n"
        "Do not include any additional text or explanation in your response.\n"
    )


def _letter(number: int) -> str:
    return chr(ord("A") + number)


def _streams(files: VideoFiles, asked: list[tuple[str, EvalQuestion]]) -> Iterator[EvalVideo | Broken]:
    """Questions by stream, from the names of their source videos."""
    streams: dict[tuple[str, float | None], list[EvalQuestion]] = {}
    for name, question in asked:
        cut = question.at_seconds or 0.0
        streams.setdefault((name, None if _coincides(cut) else cut), []).append(question)
    for (name, alone), questions in streams.items():
        if alone is not None:
            whole = (replace(question, at_seconds=None) for question in questions)
            yield files.video(name, whole, id=f"{name}@{alone:g}", until_seconds=alone)
            continue
        seconds = {question.id: math.ceil(question.at_seconds or 0.0) for question in questions}
        # The last frame that a cut samples is that of the second before it.
        timed = [replace(q, at_seconds=seconds[q.id] - 1 - _SLACK_SECONDS) for q in questions]
        timed.sort(key=lambda question: seconds[question.id])
        yield files.video(name, timed, until_seconds=float(max(seconds.values())))


def _coincides(cut_seconds: float) -> bool:
    """Whether a video cut there is sampled at frames of the longer stream.

    It is while one frame a second stays within the cap on frames, because a cut then has the first frame of every
    second that it begins. Where the last of these seconds has barely begun, that frame may lie behind the cut.
    """
    begun = cut_seconds % 1
    return cut_seconds <= _MOST_FRAMES / _FPS and (begun == 0 or begun >= _LONGEST_GAP_SECONDS)
