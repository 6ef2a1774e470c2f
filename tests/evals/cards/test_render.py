"""Pixels: repeatable, soft, and a card is in the picture exactly while the story says so."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from statekv.evals.cards import render as rendering
from statekv.evals.cards.render import render
from statekv.evals.cards.world import COLORS, FIRST_TEST_SEED, SHAPES, Card, Story, frame_of, write_story

NOMINAL = {
    "red": (225, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 235),
    "yellow": (235, 220, 50),
    "pink": (235, 90, 215),
    "cyan": (60, 220, 225),
}
SECONDS = np.arange(24, dtype=np.float64)


@pytest.fixture
def sigmas(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Takes the noise away; holds how strong it would have been, one number for each call."""
    asked: list[float] = []

    def none(seed: int, times: NDArray[np.float64], shape: tuple[int, ...], sigma: float) -> NDArray[np.float32]:
        asked.append(sigma)
        return np.zeros(shape, np.float32)

    monkeypatch.setattr(rendering, "_noise", none)
    return asked


def story_of(seed: int, cards: int, duration: float = 24.0) -> Story:
    """The first story from a seed on that has so many cards."""
    return next(s for s in (write_story(seed + i, duration) for i in range(1000)) if len(s.cards) == cards)


def pixels_near(picture: NDArray[np.uint8], color: str) -> int:
    shades = np.linspace(0.88, 1.04, 9)[:, None] * np.asarray(NOMINAL[color], float)  # [9, 3]
    distance = np.linalg.norm(picture[:, :, None].astype(float) - shades, axis=-1).min(-1)  # [H, W]
    return int((distance < 40).sum())


@pytest.mark.parametrize("size", [32, 64, 30])
def test_size_and_dtype(size: int) -> None:
    frames = render(write_story(1, 24.0), SECONDS[:5], size)
    assert frames.shape == (5, size, size, 3)
    assert frames.dtype == np.uint8


def test_a_story_looks_the_same_every_time_and_no_two_look_alike() -> None:
    one, other = write_story(1, 24.0), write_story(2, 24.0)
    assert np.array_equal(render(one, SECONDS, 32), render(one, SECONDS, 32))
    assert not np.array_equal(render(one, SECONDS, 32), render(other, SECONDS, 32))


def test_the_background_moves_and_noise_does_not_repeat() -> None:
    frames = render(Story(4, 24.0, ()), SECONDS, 32).astype(int)
    assert all(np.abs(b - a).mean() > 1 for a, b in pairwise(frames))


@pytest.mark.parametrize("seed", range(FIRST_TEST_SEED, FIRST_TEST_SEED + 12))
def test_the_card_appears_in_the_frame_that_is_the_answer(seed: int) -> None:
    story = write_story(seed, 24.0)
    frames = render(story, SECONDS, 64)
    for card in story.cards:
        first = frame_of(card, 1.0) - 1
        assert pixels_near(frames[first], card.color) > 60
        if first:
            assert pixels_near(frames[first - 1], card.color) < 15


def test_a_frame_outside_of_a_cards_time_does_not_show_it(sigmas: list[float]) -> None:
    for seed in range(10):
        story = write_story(seed, 24.0)
        bare = render(Story(seed, 24.0, ()), SECONDS, 32)
        differs = (render(story, SECONDS, 32) != bare).any(axis=(1, 2, 3))
        shown = [any(card.start_seconds <= t < card.end_seconds for card in story.cards) for t in SECONDS]
        assert differs.tolist() == shown


@pytest.mark.parametrize("cards", [1, 3, 6])
@pytest.mark.parametrize("piece", [1, 5, 16])
def test_rendering_in_pieces_shows_the_same_cards(sigmas: list[float], cards: int, piece: int) -> None:
    """A film is rendered piece by piece: a card that lies in two of them must not change its colour on the way."""
    story = story_of(7, cards)
    times = np.arange(48) / 2
    whole = render(story, times, 32)
    pieces = np.concatenate([render(story, times[i : i + piece], 32) for i in range(0, len(times), piece)])
    changed = np.abs(whole.astype(int) - pieces).max(axis=(1, 2, 3))
    assert changed.max() <= 1, f"frames differ by up to {changed.max()} of 255"


def test_rendering_in_pieces_is_equally_noisy(sigmas: list[float]) -> None:
    story = story_of(7, 4)
    for start in range(0, 24, 6):
        render(story, SECONDS[start : start + 6], 32)
    assert len(set(sigmas)) == 1


def test_pieces_of_a_video_do_not_repeat_their_noise() -> None:
    story = Story(next(seed for seed in range(100) if _noisy(seed)), 24.0, ())
    first, second = (render(story, SECONDS[start : start + 6], 32).astype(int) for start in (0, 6))
    a, b = (np.diff(piece, axis=2).ravel() for piece in (first, second))  # neighbours: the smooth part cancels
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.3


def _noisy(seed: int) -> bool:
    frames = render(Story(seed, 24.0, ()), SECONDS[:1], 32).astype(int)
    return bool(np.diff(frames, axis=2).std() > 10)


def coverage(card: Card, size: int) -> NDArray[np.float32]:
    """[H, W] how much of each pixel the card hides, from pixels alone."""
    bare, shown = (render(Story(3, 4.0, cards), np.zeros(1), size)[0].astype(np.float32) for cards in ((), (card,)))
    difference = np.abs(shown - bare).sum(-1)
    found: NDArray[np.float32] = difference / np.abs(shown - bare).sum(-1).max()
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [32, 64])
def test_cards_have_soft_edges_and_a_size(sigmas: list[float], shape: str, size: int) -> None:
    hidden = coverage(Card("red", shape, 0.0, 2.0, 0.52, 0.49, 0.25), size)
    soft, solid = ((hidden > 0.08) & (hidden < 0.6)).sum(), (hidden > 0.8).sum()
    assert soft > 4
    assert 0.03 < solid / size**2 < 0.25
    assert hidden[[0, -1]].max() == hidden[:, [0, -1]].max() == 0  # nothing at the border


def test_shapes_tell_each_other_apart(sigmas: list[float]) -> None:
    masks = {shape: coverage(Card("red", shape, 0.0, 2.0, 0.5, 0.5, 0.22), 32) for shape in SHAPES}
    for a, b in combinations(SHAPES, 2):
        assert np.abs(masks[a] - masks[b]).sum() > 15, (a, b)


def test_colors_tell_each_other_apart() -> None:
    assert tuple(NOMINAL) == COLORS
    for a, b in combinations(NOMINAL.values(), 2):
        assert np.linalg.norm(np.subtract(a, b)) > 100
