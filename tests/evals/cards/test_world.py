"""Stories: repeatable, without overlap, and every answer follows from the cards."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest

from statekv.evals.cards.world import (
    COLORS,
    FIRST_TEST_SEED,
    KINDS,
    SHAPES,
    Question,
    Story,
    frame_of,
    questions,
    write_story,
)

DURATIONS = (2.0, 3.0, 5.0, 12.0, 24.0, 100.0, 512.0, 7200.0)


def stories(duration: float, count: int = 60, first_seed: int = 0) -> list[Story]:
    return [write_story(first_seed + i, duration) for i in range(count)]


def asked(story: Story, per_kind: int = 4, seed: int = 0, fps: float = 1.0) -> list[Question]:
    return questions(story, np.random.default_rng([story.seed, seed]), per_kind, fps)


def answer_by_hand(story: Story, text: str, fps: float) -> str:
    """The answer, from the text of the question and the cards alone."""
    by_color = {card.color: card for card in story.cards}
    if match := re.fullmatch(r"what color was the (\w+)\?", text):
        (found,) = [card for card in story.cards if card.shape == match[1]]
        return found.color
    if match := re.fullmatch(r"what shape was the (\w+) card\?", text):
        return by_color[match[1]].shape
    if text == "how many cards?":
        return str(len(story.cards))
    if match := re.fullmatch(r"in which frame did the (\w+) card appear\?", text):
        card = by_color[match[1]]
        times = [k / fps for k in range(math.ceil(story.duration_seconds * fps))]
        return str(1 + next(k for k, t in enumerate(times) if card.start_seconds <= t < card.end_seconds))
    if match := re.fullmatch(r"what came after the (\w+) card\?", text):
        later = [card for card in story.cards if card.start_seconds > by_color[match[1]].start_seconds]
        follower = min(later, key=lambda card: card.start_seconds, default=None)
        return f"{follower.color} {follower.shape}" if follower else "nothing"
    match = re.fullmatch(r"which came first, (\w+) or (\w+)\?", text)
    assert match, text
    return min(match.groups(), key=lambda color: by_color[color].start_seconds)


@pytest.mark.parametrize("duration", DURATIONS)
def test_a_seed_tells_the_same_story_every_time(duration: float) -> None:
    assert stories(duration) == stories(duration)
    assert len(set(stories(duration))) == 60


@pytest.mark.parametrize("duration", DURATIONS)
@pytest.mark.parametrize("first_seed", [0, FIRST_TEST_SEED])
def test_cards_fit_in_time_and_picture_and_never_meet(duration: float, first_seed: int) -> None:
    for story in stories(duration, first_seed=first_seed):
        cards = story.cards
        assert cards
        assert cards[0].start_seconds >= 0
        assert cards[-1].end_seconds <= duration + 1e-9
        for card, following in pairwise(cards):
            assert card.end_seconds <= following.start_seconds + 1e-9
        for card in cards:
            assert card.radius <= card.x <= 1 - card.radius
            assert card.radius <= card.y <= 1 - card.radius
        assert len({card.color for card in cards}) == len({card.shape for card in cards}) == len(cards)
        assert {card.color for card in cards} <= set(COLORS)
        assert {card.shape for card in cards} <= set(SHAPES)


@pytest.mark.parametrize("duration", DURATIONS)
def test_every_card_is_on_screen_in_a_frame_at_one_frame_a_second(duration: float) -> None:
    for story in stories(duration, 200):
        for card in story.cards:
            second = frame_of(card, 1.0) - 1
            assert card.start_seconds <= second < card.end_seconds
            assert second < duration
            assert second - 1 < card.start_seconds


@pytest.mark.parametrize("fps", [1.0, 2.0])
@pytest.mark.parametrize("duration", DURATIONS)
def test_answers_are_right(duration: float, fps: float) -> None:
    for story in stories(duration, 25):
        for question in asked(story, fps=fps):
            assert question.answer == answer_by_hand(story, question.text, fps), question.text


def test_questions_repeat_for_a_seed_and_each_text_is_asked_once() -> None:
    for story in stories(100.0):
        found = asked(story, seed=5)
        assert found == asked(story, seed=5)
        assert len({question.text for question in found}) == len(found)


def test_every_kind_is_asked_up_to_the_number_wanted() -> None:
    for story in stories(100.0):
        kinds = Counter(question.kind for question in asked(story, per_kind=3))
        expected = set(KINDS) if len(story.cards) > 1 else set(KINDS) - {"first"}
        assert set(kinds) == expected
        assert max(kinds.values()) <= 3


@pytest.mark.parametrize("duration", [24.0, 512.0])
def test_answers_are_spread(duration: float) -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for story in stories(duration, 400, FIRST_TEST_SEED):
        for question in asked(story, per_kind=2):
            answers[question.kind][question.answer] += 1
    assert set(answers["color"]) == set(answers["first"]) == set(COLORS)
    assert set(answers["shape"]) == set(SHAPES)
    assert set(answers["count"]) == {"1", "2", "3", "4", "5", "6"}
    assert min(answers["count"].values()) > 400 / 6 / 2
    assert set(answers["after"]) == {"nothing", *(f"{color} {shape}" for color in COLORS for shape in SHAPES)}
    assert len(answers["when"]) > duration / 2


@functools.cache
def asked_of_many(duration: float) -> list[Question]:
    return [question for story in stories(duration, 2000, FIRST_TEST_SEED) for question in asked(story, per_kind=3)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("duration", [24.0, 512.0])
def test_no_constant_answer_beats_chance(kind: str, duration: float) -> None:
    """What is printed as the share that guessing gets is not less than what it gets."""
    found = [question for question in asked_of_many(duration) if question.kind == kind]
    answer, times = Counter(question.answer for question in found).most_common(1)[0]
    chance = sum(question.chance for question in found) / len(found)
    share = times / len(found)
    assert share <= 1.25 * chance + 0.02, f"{answer!r} alone gets {share:.2f}, chance is said to be {chance:.2f}"
