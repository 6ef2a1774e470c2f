"""Stories are the same by seed, hold what is asked about, and the right option is right."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from statekv.bench.words.stories import KINDS, Story, tell
from statekv.errors import ConfigError

TOKENS, STEP = 1000, 30
_NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]


class Words:
    """A tokenizer with a token for each word, and the way back."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        return [self._ids.setdefault(word, len(self._ids)) for word in text.split()]

    def text(self, ids: tuple[int, ...]) -> str:
        words = list(self._ids)
        return " ".join(words[number] for number in ids)


def told(seed: int) -> tuple[Story, Words]:
    words = Words()
    return tell(seed, TOKENS, STEP, words.encode), words


@pytest.mark.parametrize("seed", range(5))
def test_what_is_asked_has_been_told_and_the_right_option_says_it(seed: int) -> None:
    story, words = told(seed)
    assert len(story.ids) == TOKENS
    for question in story.questions:
        before = words.text(story.ids[: question.after])
        came, right = re.findall(r"The (\w+) comes in\.", before), question.options[question.right]
        if question.kind == "needle":
            (who,) = re.findall(r"What does the (\w+) have", question.text)
            assert f"It is the {right} of the {who}." in before
        elif question.kind == "order":
            assert list(question.options) == came
            assert right == (came[0] if "first" in question.text else came[-1])
        else:
            assert right == _NUMBERS[len(came) - 1]
            assert re.findall(r"That makes (\w+) guest", before)[-1] == right
        assert len(set(question.options)) == len(question.options)


@pytest.mark.parametrize("seed", range(5))
def test_questions_come_behind_steps_as_the_story_goes_on(seed: int) -> None:
    story, words = told(seed)
    moments = sorted({question.after for question in story.questions})
    assert all(after % STEP == 0 or after == TOKENS for after in moments)
    assert moments[-1] > 0.9 * TOKENS
    assert {question.kind for question in story.questions} == set(KINDS)
    assert all(earlier.told <= later.begun for earlier, later in pairwise(story.guests))
    assert not any(guest.begun < after < guest.told for guest in story.guests for after in moments)
    assert story.guests[-1].told <= TOKENS
    assert words.text(story.ids[story.guests[0].begun : story.guests[0].told]).endswith("That makes one guest.")


def test_a_story_is_the_same_by_seed_and_varied() -> None:
    (story, words), (same, _), (other, _) = told(3), told(3), told(4)
    assert story == same
    assert story.ids != other.ids
    assert {len(told(seed)[0].guests) for seed in range(12)} > {4, 8}
    sentences = words.text(story.ids).split(". ")
    assert len(set(sentences)) > 0.9 * len(sentences)


def test_a_story_needs_room_for_its_guests() -> None:
    with pytest.raises(ConfigError, match=r"tokens is 64, but a story of \d guests takes \d+ \(read more tokens\)"):
        tell(0, 64, 16, Words().encode)
