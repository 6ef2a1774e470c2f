"""Prompts, settings and figures of the public benchmarks: those of lmms-eval's own tasks."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from statekv.evals import open_task
from statekv.evals.task import EvalVideo
from statekv.evals.tasks.mlvu import TASK_TYPES
from statekv.evals.tasks.ovo import BACKWARD, REALTIME
from tests.evals.data_sets import mlvu, ovo, place, videomme, write_lines
from tests.evals.lmms.stock_lmms import needs_lmms, run_python

_WORDS = (
    "A",
    "B",
    "C",
    "D",
    "B.",
    "(C)",
    "D) none",
    "The answer is A",
    "It could be B, or C",
    "Between",
    "none",
    "",
    " C\n",
)
_DOMAINS = ("Knowledge", "Film & Television", "Life Record")


def _videomme(number: int, draws: random.Random) -> dict[str, Any]:
    duration, domain = draws.choice(("short", "medium", "long")), draws.choice(_DOMAINS)
    return videomme(number, "a", duration=duration, domain=domain, answer=draws.choice("ABCD"))


def _mlvu(number: int, draws: random.Random) -> dict[str, Any]:
    return mlvu("a.mp4", task_type=TASK_TYPES[number % 7], answer=draws.choice("ABCD"))


def _ovo(tasks: tuple[str, ...]) -> Callable[[int, random.Random], dict[str, Any]]:
    def record(number: int, draws: random.Random) -> dict[str, Any]:
        return ovo(number, "a.mp4", number + 1, task=draws.choice(tasks), gt=draws.randrange(4))

    return record


RECORDS = {
    "videomme": (_videomme, "test.jsonl"),
    "mlvu": (_mlvu, "test.jsonl"),
    "ovo_realtime": (_ovo(REALTIME), "realtime/data.jsonl"),
    "ovo_backward": (_ovo(BACKWARD), "backward/data.jsonl"),
}


@needs_lmms
def test_prompts_settings_and_figures_are_those_of_lmms_eval(tmp_path: Path) -> None:
    draws = random.Random(3)
    cases: dict[str, dict[str, list[Any]]] = {
        name: {"records": [make(number, draws) for number in range(60)], "answers": draws.choices(_WORDS, k=60)}
        for name, (make, _) in RECORDS.items()
    }
    script = str(Path(__file__).with_name("scoring_of_lmms_eval.py"))
    done = run_python(tmp_path, script, str(tmp_path), stdin=json.dumps(cases))
    assert done.returncode == 0, done.stderr
    theirs = json.loads((tmp_path / "found.json").read_text())
    for name, (_, path) in RECORDS.items():
        folder, case = tmp_path / name, cases[name]
        write_lines(folder / path, case["records"])
        place(folder, "a.mp4")
        task = open_task(name, folder)
        assert task.settings["max_new_tokens"] == theirs[name]["max_new_tokens"]
        (video,) = task.videos()
        assert isinstance(video, EvalVideo)
        assert [question.prompt for question in video.questions] == theirs[name]["prompts"]
        rows = [
            {"kind": question.kind, "group": question.group, **task.right(question, answer.strip())}
            for question, answer in zip(video.questions, case["answers"], strict=True)
        ]
        figure = next(iter(task.headlines(rows).values()))
        assert figure == pytest.approx(theirs[name]["figure"] / 100), name
        assert 0.1 < figure < 0.7
