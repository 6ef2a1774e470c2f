"""What happens in a synthetic video, and what can be asked about it; no pixels here.

A video shows coloured shapes ("cards"), one at a time, on a moving background. Colours and shapes are drawn
without repetition, so that every question has one answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

COLORS = ("red", "green", "blue", "yellow", "pink", "cyan")
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
KINDS = ("color", "shape", "first", "after", "count", "when")

# Seeds below are for training, seeds from here on for testing: the two never meet.
FIRST_TEST_SEED = 1_000_000_000

_SHORTEST_CARD, _LONGEST_CARD = 1.05, 3.4  # seconds; over a second, so that 1 frame/s never misses a card
_SECONDS_PER_CARD = 1.5  # room that a short video must have for each


@dataclass(frozen=True)
class Card:
    """One coloured shape on screen.

    Attributes:
        start_seconds, duration_seconds: when it is on screen.
        x, y: centre, as shares of the picture's width and height.
        radius: half its size, as a share of the picture's height.
    """

    color: str
    shape: str
    start_seconds: float
    duration_seconds: float
    x: float
    y: float
    radius: float

    @property
    def end_seconds(self) -> float:
        return self.start_seconds + self.duration_seconds


@dataclass(frozen=True)
class Question:
    """One question with its only right answer.

    `chance` is the share that somebody who has not seen the video gets right by the best guess for the kind.
    """

    kind: str
    text: str
    answer: str
    chance: float


@dataclass(frozen=True)
class Story:
    """Everything that one video shows: its seed, its length in seconds and its cards in order of time."""

    seed: int
    duration_seconds: float
    cards: tuple[Card, ...]


def write_story(seed: int, duration_seconds: float, max_cards: int = len(COLORS)) -> Story:
    """Invent a story; the same seed and length always give the same one.

    Args:
        seed: below FIRST_TEST_SEED for training, from there on for testing.
        duration_seconds: length of the video, at least 2 s.
        max_cards: at most this many cards; short videos hold fewer.
    """
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, min(max_cards, most_cards(duration_seconds)) + 1))
    colors = rng.permutation(len(COLORS))[:count]
    shapes = rng.permutation(len(SHAPES))[:count]
    durations = rng.uniform(_SHORTEST_CARD, min(_LONGEST_CARD, duration_seconds / count * 0.95), size=count)
    slack = duration_seconds - float(durations.sum())
    # Uniform spacings: sorted points cut the free time into gaps before, between and after the cards.
    gaps = np.diff(np.concatenate([[0.0], np.sort(rng.uniform(0.0, slack, size=count))]))
    starts = np.cumsum(gaps) + np.concatenate([[0.0], np.cumsum(durations)[:-1]])
    cards = []
    for color, shape, start, duration in zip(colors, shapes, starts, durations, strict=True):
        radius = float(rng.uniform(0.18, 0.29))
        x, y = map(float, rng.uniform(radius + 0.02, 0.98 - radius, size=2))
        cards.append(Card(COLORS[color], SHAPES[shape], float(start), float(duration), x, y, radius))
    return Story(seed, duration_seconds, tuple(cards))


def most_cards(duration_seconds: float) -> int:
    """Cards that fit in a video of this length."""
    return min(len(COLORS), max(1, int(duration_seconds / _SECONDS_PER_CARD)))


def frame_of(card: Card, fps: float) -> int:
    """Number (from 1) of the first frame that shows the card when the video is sampled at `fps`."""
    return math.ceil(card.start_seconds * fps - 1e-9) + 1


def questions(story: Story, rng: np.random.Generator, per_kind: int = 1, fps: float = 1.0) -> list[Question]:
    """Questions about a story, up to `per_kind` of every kind that it allows.

    Args:
        per_kind: how many of each kind; a story with one card allows no question of order.
        fps: sampling rate that the answers of kind "when" (a frame's number) refer to.
    """
    asked: dict[str, Question] = {}
    for kind in KINDS:
        for _ in range(per_kind):
            question = _question(kind, story, rng, fps)
            if question is not None:
                asked.setdefault(question.text, question)
    return list(asked.values())


def _question(kind: str, story: Story, rng: np.random.Generator, fps: float) -> Question | None:
    cards = story.cards
    i = int(rng.integers(len(cards)))
    card, most = cards[i], most_cards(story.duration_seconds)
    if kind == "color":
        return Question(kind, f"what color was the {card.shape}?", card.color, 1 / len(COLORS))
    if kind == "shape":
        return Question(kind, f"what shape was the {card.color} card?", card.shape, 1 / len(SHAPES))
    if kind == "count":
        return Question(kind, "how many cards?", str(len(cards)), 1 / most)
    if kind == "when":
        frames = max(1, math.floor(story.duration_seconds * fps))
        text = f"in which frame did the {card.color} card appear?"
        return Question(kind, text, str(frame_of(card, fps)), 1 / frames)
    if kind == "after":
        follower = f"{cards[i + 1].color} {cards[i + 1].shape}" if i + 1 < len(cards) else "nothing"
        # The best guess is "nothing", right for one card of each story.
        chance = sum(1 / (n + 1) for n in range(most)) / most
        return Question(kind, f"what came after the {card.color} card?", follower, chance)
    if len(cards) < 2:
        return None
    a, b = rng.choice(len(cards), size=2, replace=False)
    text = f"which came first, {cards[a].color} or {cards[b].color}?"
    return Question(kind, text, cards[min(a, b)].color, 1 / 2)
