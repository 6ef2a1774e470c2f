"""The demo world's benchmark: films that stay, questions that can be answered when they are asked, honest chances."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from statekv.errors import ConfigError
from statekv.evals.cards.world import FIRST_TEST_SEED, Card, write_story
from statekv.evals.task import EvalQuestion
from statekv.evals.tasks.cards import Cards
from statekv.video.file import count_frames

FRAMES = 256


def cards_of(number: int) -> tuple[Card, ...]:
    return write_story(FIRST_TEST_SEED + 200_000 + number, float(FRAMES)).cards


def shown(number: int, at_seconds: float | None) -> tuple[Card, ...]:
    """Cards of a film that somebody has seen who was shown a frame a second, the last at this time."""
    last = FRAMES - 1 if at_seconds is None else at_seconds
    return tuple(card for card in cards_of(number) if -(-card.start_seconds // 1) <= last)


def questions(films: int) -> list[tuple[int, EvalQuestion]]:
    task = Cards(frames=FRAMES, films=films)
    return [(number, question) for number, video in enumerate(task.videos()) for question in video.questions]


def test_a_film_is_written_once_and_has_its_length(tmp_path: Path) -> None:
    task = Cards(tmp_path / "films", frames=128, films=2)
    first, _ = task.videos()
    assert not first.path.exists()
    task.make(first)
    assert count_frames(first.path, fps=1.0) == 128
    before = first.path.stat().st_mtime_ns
    task.make(first)
    assert first.path.stat().st_mtime_ns == before
    assert [path.name for path in first.path.parent.iterdir()] == ["cards-128-0.mp4"]


def test_the_same_films_and_questions_every_time() -> None:
    assert list(Cards(frames=300, films=3).videos()) == list(Cards(frames=300, films=9).videos())[:3]
    assert list(Cards(frames=300).videos()) != list(Cards(frames=301).videos())
    assert list(Cards(frames=300, films=2, first=3).videos()) == list(Cards(frames=300, films=5).videos())[3:]


def test_ids_are_unique_and_times_in_order() -> None:
    asked = questions(40)
    assert len({question.id for _, question in asked}) == len(asked)
    for video in Cards(frames=FRAMES, films=40).videos():
        times = [FRAMES if q.at_seconds is None else q.at_seconds for q in video.questions]
        assert times == sorted(times)
        assert len(set(times)) <= 3


def named_in(question: EvalQuestion, seen: Sequence[Card]) -> list[Card]:
    words = question.prompt.replace("?", " ").replace(",", " ").split()
    return [card for card in seen if card.color in words or card.shape in words]


def answer(question: EvalQuestion, seen: Sequence[Card]) -> str:
    """By hand, from the cards in order of time."""
    named = named_in(question, seen)
    assert len(named) == {"first": 2, "count": 0}.get(question.kind, 1)
    if question.kind == "count":
        return str(len(seen))
    if question.kind == "after":
        following = seen[seen.index(named[0]) + 1 :]
        return f"{following[0].color} {following[0].shape}" if following else "nothing"
    return named[0].shape if question.kind == "shape" else named[0].color


def test_answers_are_right_when_they_are_asked_for() -> None:
    for number, question in questions(60):
        assert question.expected == answer(question, shown(number, question.at_seconds))


def test_no_card_is_on_screen_when_a_question_is_asked() -> None:
    for number, question in questions(60):
        at = question.at_seconds
        assert at is None or not [c for c in cards_of(number) if c.start_seconds <= at < c.end_seconds]


def test_groups_tell_where_the_card_lies() -> None:
    found: Counter[str] = Counter()
    for number, question in questions(60):
        seen = shown(number, question.at_seconds)
        named = named_in(question, seen)
        end = FRAMES if question.at_seconds is None else question.at_seconds + 1
        share = named[0].start_seconds / end if named else None
        expected = "whole" if share is None else ("early", "middle", "late")[int(3 * share)]
        assert question.group == expected
        found[question.group] += 1
    assert min(found.values()) > 100


def test_every_kind_is_asked_and_none_for_frame_numbers() -> None:
    assert set(Counter(question.kind for _, question in questions(20))) == {"color", "shape", "first", "after", "count"}


def test_chance_is_what_the_best_blind_answer_gets() -> None:
    answers: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    chances: dict[tuple[str, str], list[float]] = defaultdict(list)
    for _, question in questions(300):
        when = "end" if question.at_seconds is None else "third" if question.at_seconds < FRAMES / 2 else "two thirds"
        answers[question.kind, when][question.expected] += 1
        chances[question.kind, when].append(question.chance)
    for key, found in answers.items():
        if key[0] != "first":  # the colour named first, or second, is right in half of the cases
            assert max(found.values()) / found.total() == pytest.approx(mean(chances[key]), abs=0.06), key
        else:
            assert set(chances[key]) == {0.5}


def test_scores_and_headlines() -> None:
    task = Cards()
    question = EvalQuestion("q", "color", "what color was the ring?", "red", 1 / 6)
    assert task.right(question, " red\n") == {"score": True}
    assert task.right(question, "red.") == {"score": False}
    rows = [
        {"kind": "count", "group": "whole", "score": True},
        {"kind": "color", "group": "late", "score": False},
        {"kind": "color", "group": "early", "score": True},
    ]
    found = task.headlines(rows)
    assert list(found.items()) == [("accuracy", 2 / 3), ("color", 0.5), ("count", 1.0), ("early", 1.0), ("late", 0.0)]


@pytest.mark.parametrize("settings", [{"frames": 127}, {"frames": 4097}, {"films": 0}, {"first": -1}])
def test_lengths_that_are_not_offered(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(settings))} is {next(iter(settings.values()))}"):
        Cards(**settings)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    task = Cards(tmp_path / "file" / "films", frames=128)
    with pytest.raises(ConfigError, match="cannot be a folder"):
        task.make(next(iter(task.videos())))
