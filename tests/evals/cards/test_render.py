"""Pixels: repeatable, soft, and a card is in the picture exactly while the story says so."""

from __future__ import annotations

import tracemalloc
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from statekv.errors import VideoError
from statekv.evals.cards import render as rendering
from statekv.evals.cards.render import PICTURE, SOURCE_FPS, render, write_film
from statekv.evals.cards.world import COLORS, FIRST_TEST_SEED, SHAPES, Card, Story, frame_of, write_story
from statekv.video.file import count_frames, probe, read_frames

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


LONG = Story(9, 300.0, ())


def decoded(path: Path, fps: float | None = None) -> NDArray[np.uint8]:
    """[F, H, W, 3]"""
    return torch.stack([frame.data for frame in read_frames(path, fps)]).permute(0, 2, 3, 1).numpy()


def test_a_film_is_h264_with_every_frame_at_its_time(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    write_film(write_story(FIRST_TEST_SEED, 12.0), path)
    info = probe(path)
    assert info.codec == "h264"
    assert (info.width, info.height, info.num_frames) == (PICTURE, PICTURE, 24)
    assert info.frame_rate == SOURCE_FPS
    assert info.duration_seconds == pytest.approx(12.0)
    assert [frame.pts_seconds for frame in read_frames(path)] == pytest.approx([i / 2 for i in range(24)])
    assert [frame.pts_seconds for frame in read_frames(path, fps=1.0)] == pytest.approx(range(12))
    assert count_frames(path, 1.0) == 12


@pytest.mark.parametrize("seed", [FIRST_TEST_SEED, FIRST_TEST_SEED + 1, FIRST_TEST_SEED + 2])
def test_what_comes_out_of_the_file_shows_the_cards_on_time(tmp_path: Path, seed: int) -> None:
    story = write_story(seed, 24.0)
    write_film(story, tmp_path / "film.mp4")
    frames = decoded(tmp_path / "film.mp4", fps=1.0)
    assert len(frames) == 24
    for card in story.cards:
        first = frame_of(card, 1.0) - 1
        assert pixels_near(frames[first], card.color) > 50
        if first:
            assert pixels_near(frames[first - 1], card.color) < 15


def test_a_film_is_the_same_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the encoder, which on a busy machine now and then decides a block differently."""
    written: list[list[np.ndarray]] = []
    monkeypatch.setattr(rendering, "write_video", lambda path, frames, fps: written.append(list(frames)))
    for name in ("a", "b"):
        write_film(write_story(5, 6.0), tmp_path / name)
    assert len(written[0]) == 12
    assert np.array_equal(np.stack(written[0]), np.stack(written[1]))


def test_pieces_do_not_show_in_the_film(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The very pixels that go to the encoder; the encoder itself is no judge, it amplifies a single bit."""
    monkeypatch.setattr(rendering, "_noise", lambda seed, times, shape, sigma: np.zeros(shape, np.float32))
    written: list[list[np.ndarray]] = []
    monkeypatch.setattr(rendering, "write_video", lambda path, frames, fps: written.append(list(frames)))
    story = next(s for s in (write_story(seed, 24.0) for seed in range(100)) if len(s.cards) == 4)
    for piece in (rendering._PIECE, 7):
        monkeypatch.setattr(rendering, "_PIECE", piece)
        write_film(story, tmp_path / "film.mp4")
    whole, pieces = (np.stack(frames) for frames in written)
    assert len(whole) == 48
    assert np.array_equal(whole, pieces)


def test_a_long_film_is_rendered_piece_by_piece_as_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[int] = []
    written = 0

    def counting(story: Story, times: NDArray[np.float64], size: int) -> NDArray[np.uint8]:
        rendered.append(len(times))
        return render(story, times, size)

    def consume(path: Any, frames: Any, fps: float) -> None:
        nonlocal written
        for frame in frames:
            written += 1
            assert frame.shape == (3, PICTURE, PICTURE)
            assert sum(rendered) - written < 256

    monkeypatch.setattr(rendering, "render", counting)
    monkeypatch.setattr(rendering, "write_video", consume)
    write_film(LONG, Path("nowhere"))
    assert written == sum(rendered) == 600
    assert max(rendered) == 256


def test_memory_does_not_grow_with_the_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "_PIECE", 16)

    def peak(seconds: float) -> int:
        tracemalloc.start()
        write_film(Story(9, seconds, ()), tmp_path / "film.mp4")
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(8.0)
    assert peak(64.0) < 1.2 * peak(8.0)


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="cannot be written"):
        write_film(write_story(1, 2.0), tmp_path / "no" / "film.mp4")
