"""`cards`: the demo world's own long-video benchmark, on films that nobody has trained on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from statekv.errors import ConfigError
from statekv.evals.cards.render import write_film
from statekv.evals.cards.world import COLORS, FIRST_TEST_SEED, Question, Story, questions, write_story
from statekv.evals.data import make_folder
from statekv.evals.task import EvalQuestion, EvalVideo, Rows, share, shares

# Apart from the films of `statekv demo` and of `python -m training.evaluate`.
_FIRST_SEED = FIRST_TEST_SEED + 200_000
# "when" asks for a frame's number, and the demo model has no words for numbers above 999.
_KINDS = ("color", "shape", "first", "after", "count")
_ASKED_AT = (1 / 3, 2 / 3)  # of the film, and at its end
_THIRDS = ("early", "middle", "late")
_ENOUGH = 40  # draws of each kind: nearly every question that a story allows
_SHORTEST, _LONGEST = 128, 4096  # frames


class Cards:
    """Coloured shapes in long films, asked about at a third, at two thirds and at the end.

    A question is about what has been shown until it is asked, and there is one of every kind and group that the story
    allows then. Groups tell where the card lies that the question names, between the film's beginning and the asking;
    of two cards the earlier one counts, and counting concerns the whole.

    Args:
        folder: where films are written, and found again; None: statekv-eval/films.
        frames: length of the films, at one frame a second.
        films, first: so many, from this one on. The same film of another length has the same cards at like times, so
            that what was chosen on some films is measured on others by their numbers.

    Raises:
        ConfigError: a length outside 128 … 4,096 frames, no films, or a first one below 0.
    """

    name = "cards"
    settings: Mapping[str, Any] = {"fps": 1.0, "max_new_tokens": 8}

    def __init__(self, folder: Path | None = None, frames: int = 1024, films: int = 20, first: int = 0) -> None:
        if not _SHORTEST <= frames <= _LONGEST:
            raise ConfigError(f"frames is {frames}, but must be {_SHORTEST} to {_LONGEST}", "for example 1024")
        if films < 1:
            raise ConfigError(f"films is {films}, but must be at least 1", "for example 20")
        if first < 0:
            raise ConfigError(f"first is {first}, but must be at least 0", "leave it out for the first film")
        self.folder = folder or Path("statekv-eval", "films")
        self.frames, self.films, self.first = frames, films, first
        self.variant = f"{frames} frames"

    def videos(self) -> Iterator[EvalVideo]:
        for number in range(self.first, self.first + self.films):
            story = self._story(number)
            name = f"cards-{self.frames}-{number}"
            yield EvalVideo(name, self.folder / f"{name}.mp4", tuple(_ask(story, name)))

    def make(self, video: EvalVideo) -> None:
        """Write the film unless it is there; a ConfigError or a VideoError where that cannot be."""
        if video.path.exists():
            return
        make_folder(self.folder)
        write_film(self._story(int(video.id.rsplit("-", 1)[1])), video.path)

    def right(self, question: EvalQuestion, answered: str) -> Mapping[str, bool]:
        return {"score": answered.strip() == question.expected}

    def headlines(self, rows: Rows) -> Mapping[str, float]:
        parts = shares(rows, "kind") | shares(rows, "group")
        return {"accuracy": share(rows), **{name: parts[name] for name in (*_KINDS, *_THIRDS) if name in parts}}

    def _story(self, number: int) -> Story:
        return write_story(_FIRST_SEED + number, float(self.frames))


def _ask(story: Story, name: str) -> Iterator[EvalQuestion]:
    moments = [_quiet(story, share) for share in _ASKED_AT]
    for at_seconds in (*moments, None):
        shown = story if at_seconds is None else _until(story, at_seconds)
        if not shown.cards:
            continue
        rng = np.random.default_rng([story.seed, 5, int(shown.duration_seconds)])
        share = shown.duration_seconds / story.duration_seconds
        for (kind, group), question in sorted(_choose(shown, rng).items()):
            when = "end" if at_seconds is None else f"{at_seconds:.0f}"
            id, chance = f"{name}/{when}/{kind}-{group}", _chance(question, share)
            yield EvalQuestion(id, kind, question.text, question.answer, chance, at_seconds, group)


def _quiet(story: Story, share: float) -> float:
    """The last whole second before a share of the story at which no card is on screen."""
    second = math.floor(story.duration_seconds * share)
    while any(card.start_seconds <= second < card.end_seconds for card in story.cards):
        second -= 1
    return float(second)


def _until(story: Story, seconds: float) -> Story:
    """What a viewer has seen who has just been shown the frame at a quiet second."""
    cards = tuple(card for card in story.cards if card.end_seconds <= seconds)
    return Story(story.seed, seconds + 1, cards)


def _choose(shown: Story, rng: np.random.Generator) -> dict[tuple[str, str], Question]:
    """One question of every kind and group."""
    pool = questions(shown, rng, _ENOUGH)
    found: dict[tuple[str, str], Question] = {}
    for index in rng.permutation(len(pool)):
        question = pool[index]
        if question.kind in _KINDS:
            found.setdefault((question.kind, _group(shown, question)), question)
    return found


def _group(shown: Story, question: Question) -> str:
    words = set(question.text.replace("?", " ").replace(",", " ").split())
    named = next((card for card in shown.cards if words & {card.color, card.shape}), None)  # the earliest
    return "whole" if named is None else _THIRDS[min(2, int(3 * named.start_seconds / shown.duration_seconds))]


def _chance(question: Question, share: float) -> float:
    """What a guesser gets who knows this benchmark and the time, but has not seen the film.

    Of n cards, drawn evenly from 1 … 6, k have been shown after a share of the film; where k is 0 nothing is asked.
    """
    if question.kind not in ("count", "after"):
        return question.chance
    most = len(COLORS)
    shown = [
        sum(math.comb(n, k) * share**k * (1 - share) ** (n - k) for n in range(k, most + 1)) for k in range(1, most + 1)
    ]
    if question.kind == "count":
        return max(shown) / sum(shown)
    asked = [_asked_after(k) for k in range(1, most + 1)]
    nothing, every = (sum(p * a[part] for p, a in zip(shown, asked, strict=True)) for part in (0, 1))
    return nothing / every


def _asked_after(cards: int) -> tuple[float, float]:
    """Questions of kind "after" about so many cards in random thirds: answered by "nothing", and all; expected."""
    nothing = every = 0.0
    for early, middle in itertools.product(range(cards + 1), repeat=2):
        if (late := cards - early - middle) >= 0:
            probability = math.comb(cards, early) * math.comb(cards - early, middle) / 3**cards
            # Each third with cards has one question, and nothing came after the last card alone.
            every += probability * sum(third > 0 for third in (early, middle, late))
            nothing += probability / (late or middle or early)
    return nothing, every
