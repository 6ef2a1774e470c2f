"""Video-MME: records to questions, and its figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from statekv.evals import open_task
from statekv.evals.task import Broken, EvalQuestion, EvalVideo
from statekv.evals.tasks.videomme import VideoMME
from tests.evals.data_sets import place, videomme, write_lines

PROMPT = """\
Select the best answer to the following multiple-choice question based on the video and the subtitles. \
Respond with only the letter (A, B, C, or D) of the correct option.
How many cards are shown?
A. One.
B. Two.
C. Three.
D. Four.

Answer with the option's letter from the given choices directly."""


def test_questions_stand_with_their_video(tmp_path: Path) -> None:
    records = [
        videomme(1, "fFjv93ACGo8"),
        videomme(2, "-a_b", duration="long", domain="Knowledge", answer="A"),
        videomme(3, "fFjv93ACGo8", answer="B"),
    ]
    write_lines(tmp_path / "test.jsonl", records)
    place(tmp_path, "data/fFjv93ACGo8.mp4", "data/-a_b.mkv")
    first, second = open_task("videomme", tmp_path).videos()
    asked = EvalQuestion("001-1", "Knowledge", PROMPT, "C", chance=0.25, group="short")
    assert isinstance(first, EvalVideo)
    assert first == EvalVideo("fFjv93ACGo8", tmp_path / "data/fFjv93ACGo8.mp4", first.questions)
    assert first.questions[0] == asked
    assert [question.expected for question in first.questions] == ["C", "B"]
    assert isinstance(second, EvalVideo)
    assert (second.path.name, second.questions[0].group) == ("-a_b.mkv", "long")


def test_faults_are_told_and_the_rest_goes_on(tmp_path: Path) -> None:
    faulty: list[dict | str] = [
        videomme(1, "a"),
        videomme(1, "a"),
        videomme(2, "a", answer="E"),
        "{",
        videomme(3, "absent"),
    ]
    write_lines(tmp_path / "test.jsonl", faulty)
    place(tmp_path, "a.mp4")
    found = list(VideoMME(tmp_path).videos())
    assert [thing.id for thing in found if isinstance(thing, Broken)] == [f"test.jsonl line {n}" for n in (2, 3, 4)]
    assert Broken("test.jsonl line 3", "has the answer 'E' to 4 options") in found
    videos = [thing for thing in found if isinstance(thing, EvalVideo)]
    assert [(video.id, video.path.exists(), len(video.questions)) for video in videos] == [
        ("a", True, 1),
        ("absent", False, 1),
    ]


@pytest.mark.parametrize(
    ("answered", "verdicts"),
    [
        ("C", {"score": True, "letter": True, "early": True}),
        ("C. Three.", {"score": True, "letter": False, "early": True}),
        ("Can it be A", {"score": False, "letter": False, "early": True}),
        ("Being sure: (C)", {"score": True, "letter": False, "early": False}),
        ("B", {"score": False, "letter": False, "early": False}),
    ],
)
def test_verdicts(answered: str, verdicts: dict[str, bool]) -> None:
    question = EvalQuestion("1", "Knowledge", PROMPT, "C", 0.25)
    assert VideoMME().right(question, answered) == verdicts


def test_figures() -> None:
    """Over all questions, not over classes."""
    rows = [{"kind": "Knowledge", "group": "short", "score": True} for _ in range(3)]
    rows += [{"kind": "Life Record", "group": "long", "score": False}]
    figures = VideoMME().headlines(rows)
    assert figures == {"accuracy": 0.75, "short": 1.0, "long": 0.0, "Knowledge": 1.0, "Life Record": 0.0}
    assert next(iter(figures)) == "accuracy"


def test_the_setting_is_the_paper_s() -> None:
    assert VideoMME.settings == {"fps": 1.0, "max_frames": 512, "max_new_tokens": 16}
