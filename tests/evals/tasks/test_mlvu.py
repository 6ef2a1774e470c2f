"""MLVU: records to questions, and its figure."""

from __future__ import annotations

from pathlib import Path

import pytest

from statekv.evals import open_task
from statekv.evals.task import Broken, EvalQuestion, EvalVideo
from statekv.evals.tasks.mlvu import MLVU
from tests.evals.data_sets import mlvu, place, write_lines

PROMPT = """\
What comes first?
(A) a ring
(B) a cross
(C) a square
(D) a circle

Only give the best option.
Best option: ("""


def test_questions_stand_with_their_video(tmp_path: Path) -> None:
    records = [mlvu("order_1.mp4"), mlvu("needle_7.mp4", task_type="needle"), mlvu("order_1.mp4", answer="D")]
    write_lines(tmp_path / "test.jsonl", records)
    place(tmp_path, "video_part_1/order_1.mp4", "needle_7.mp4")
    first, second = open_task("mlvu", tmp_path).videos()
    assert isinstance(first, EvalVideo)
    assert first.path == tmp_path / "video_part_1/order_1.mp4"
    assert first.questions[0] == EvalQuestion("order-0", "order", PROMPT, "B", chance=0.25)
    assert [question.id for question in first.questions] == ["order-0", "order-2"]
    assert isinstance(second, EvalVideo)
    assert second.questions[0].kind == "needle"


def test_faults_are_told_and_the_rest_goes_on(tmp_path: Path) -> None:
    faulty = [mlvu("a.mp4", task_type="summary"), mlvu("a.mp4", answer="a ring"), mlvu("a.mp4", candidates=None)]
    write_lines(tmp_path / "test.jsonl", [*faulty, mlvu("a.mp4")])
    place(tmp_path, "a.mp4")
    *told, video = MLVU(tmp_path).videos()
    assert all(isinstance(thing, Broken) for thing in told)
    assert [thing.id for thing in told] == [f"test.jsonl line {n}" for n in (1, 2, 3)]
    assert isinstance(video, EvalVideo)
    assert [question.id for question in video.questions] == ["order-3"]


@pytest.mark.parametrize(
    ("answered", "verdicts"),
    [
        ("B", {"score": True, "letter": True, "early": True}),
        ("B) a cross", {"score": True, "letter": False, "early": True}),
        ("B.", {"score": True, "letter": True, "early": False}),
        ("(B", {"score": True, "letter": True, "early": False}),
        ("D", {"score": False, "letter": False, "early": False}),
    ],
)
def test_verdicts(answered: str, verdicts: dict[str, bool]) -> None:
    assert MLVU().right(EvalQuestion("1", "order", PROMPT, "B", 0.25), answered) == verdicts


def test_the_figure_weighs_task_types_alike() -> None:
    rows = [{"kind": "order", "score": True} for _ in range(3)] + [{"kind": "count", "score": False}]
    means = {"mean of task types": 0.5, "mean of questions": 0.75}
    assert MLVU().headlines(rows) == {**means, "order": 1.0, "count": 0.0}


def test_the_setting_is_the_paper_s() -> None:
    assert MLVU.settings == {"fps": 1.0, "max_frames": 512, "max_new_tokens": 16}
