"""Requests of lmms-eval: what becomes of them, and one prefill for each video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from statekv.engine.engine import Engine
from statekv.engine.session import Session
from statekv.errors import ConfigError, VideoError
from statekv.evals.lmms_requests import VideoQuestion, answer_all, question_of
from statekv.video.writer import write_video
from tests.talk import shared_engine
from tests.tiny import video

GREEDY = {"max_new_tokens": 16, "temperature": 0.0, "top_p": 1.0, "num_beams": 1, "do_sample": False}


def test_a_request_becomes_a_question() -> None:
    asked = question_of("Which?", GREEDY | {"until": ["\n\n"]}, ["a.mp4"], "videomme")
    assert asked == VideoQuestion("a.mp4", "Which?", {"max_new_tokens": 16, "stop": ()})


@pytest.mark.parametrize(
    ("until", "stop"), [(None, ()), ("END", ("END",)), (["\n\n", "END", "."], ("END", ".")), ([], ())]
)
def test_ends_of_answers(until: Any, stop: tuple[str, ...]) -> None:
    assert question_of("Which?", {"until": until}, "a.mp4", "some").answering == {"max_new_tokens": None, "stop": stop}


def test_drawn_answers() -> None:
    wanted = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "image_aspect_ratio": "pad"}
    drawn = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": None, "stop": ()}
    assert question_of("Which?", wanted, ["a.mp4"], "some").answering == drawn
    assert "do_sample" not in question_of("Which?", wanted | {"temperature": 0.0}, ["a.mp4"], "some").answering


@pytest.mark.parametrize(
    ("visuals", "shown"),
    [([], "nothing"), (["a.mp4", "b.mp4"], "str, str"), ([b"\x89PNG"], "bytes"), (None, "NoneType")],
)
def test_other_than_one_video_is_an_error(visuals: Any, shown: str) -> None:
    with pytest.raises(ConfigError, match=f"task mmmu shows {shown}, but statekv watches one video"):
        question_of("Which?", GREEDY, visuals, "mmmu")


def test_beams_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"task some wants num_beams 4, .* \(--gen_kwargs num_beams=1\)"):
        question_of("Which?", GREEDY | {"num_beams": 4}, ["a.mp4"], "some")


def test_each_video_is_watched_once_and_answers_keep_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = shared_engine("internvl")
    clips = [str(tmp_path / name) for name in ("a.mp4", "b.mp4")]
    for clip, frames in zip(clips, (12, 8), strict=True):
        write_video(clip, video(frames), fps=2)
    # Each video has a question that no other has, and answers differ by their length at least.
    texts = ("What happens?", "Why?", "What happens?", "How many?")
    questions = [VideoQuestion(clips[n % 2], text, {"max_new_tokens": 3 + n}) for n, text in enumerate(texts)]
    expected = [alone(engine, question) for question in questions]
    assert len(set(expected)) == 4
    opened: list[str] = []
    plain = engine.open

    def counting(path: str) -> Session:
        opened.append(path)
        return plain(path)

    monkeypatch.setattr(engine, "open", counting)
    told: list[tuple[int, str]] = []
    assert answer_all(engine, questions, lambda number, answer: told.append((number, answer))) == expected
    assert opened == clips
    assert sorted(told) == list(enumerate(expected))


def alone(engine: Engine, question: VideoQuestion) -> str:
    with engine.open(question.video) as session:
        session.watch()
        return session.ask(question.prompt, **question.answering)


def test_a_missing_video_is_not_answered_somehow(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"absent\.mp4 does not exist"):
        answer_all(shared_engine("internvl"), [VideoQuestion(str(tmp_path / "absent.mp4"), "Which?")])
