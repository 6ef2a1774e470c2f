"""Stories as files: real H.264, the right frames at the right times, one piece in memory at a time."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from statekv.errors import VideoError
from statekv.evals.cards import film, render
from statekv.evals.cards.film import PICTURE, SOURCE_FPS, write_film
from statekv.evals.cards.world import FIRST_TEST_SEED, Story, frame_of, write_story
from statekv.video.reader import count_frames, probe, read_frames
from tests.evals.cards.test_render import pixels_near

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
    monkeypatch.setattr(film, "write_video", lambda path, frames, fps: written.append(list(frames)))
    for name in ("a", "b"):
        write_film(write_story(5, 6.0), tmp_path / name)
    assert len(written[0]) == 12
    assert np.array_equal(np.stack(written[0]), np.stack(written[1]))


def test_pieces_do_not_show_in_the_film(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The very pixels that go to the encoder; the encoder itself is no judge, it amplifies a single bit."""
    monkeypatch.setattr(render, "_noise", lambda seed, times, shape, sigma: np.zeros(shape, np.float32))
    written: list[list[np.ndarray]] = []
    monkeypatch.setattr(film, "write_video", lambda path, frames, fps: written.append(list(frames)))
    story = next(s for s in (write_story(seed, 24.0) for seed in range(100)) if len(s.cards) == 4)
    for piece in (film._PIECE, 7):
        monkeypatch.setattr(film, "_PIECE", piece)
        write_film(story, tmp_path / "film.mp4")
    whole, pieces = (np.stack(frames) for frames in written)
    assert len(whole) == 48
    assert np.array_equal(whole, pieces)


def test_a_long_film_is_rendered_piece_by_piece_as_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[int] = []
    written = 0

    def counting(story: Story, times: NDArray[np.float64], size: int) -> NDArray[np.uint8]:
        rendered.append(len(times))
        return render.render(story, times, size)

    def consume(path: Any, frames: Any, fps: float) -> None:
        nonlocal written
        for frame in frames:
            written += 1
            assert frame.shape == (3, PICTURE, PICTURE)
            assert sum(rendered) - written < 256

    monkeypatch.setattr(film, "render", counting)
    monkeypatch.setattr(film, "write_video", consume)
    write_film(LONG, Path("nowhere"))
    assert written == sum(rendered) == 600
    assert max(rendered) == 256


def test_memory_does_not_grow_with_the_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(film, "_PIECE", 16)

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
