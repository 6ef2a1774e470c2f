"""Pixels of a story: cards with soft edges on a drifting, noisy background, at any size and any times."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from statekv.evals.cards.world import Card, Story
from statekv.video.writer import write_video

_RGB = {
    "red": (225, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 235),
    "yellow": (235, 220, 50),
    "pink": (235, 90, 215),
    "cyan": (60, 220, 225),
}
Pixels = NDArray[np.float32]


def render(story: Story, times: NDArray[np.float64], size: int) -> NDArray[np.uint8]:
    """Frames of a story, `size` pixels high and wide.

    Args:
        times: [F] seconds from the start of the video.

    Returns:
        [F, size, size, 3] uint8 RGB.
    """
    rng = np.random.default_rng([story.seed, 1])
    frames = _background(rng, times, size)
    # Drawn whether or not a card is in these times: pieces of one video must agree.
    shades = [np.float32(rng.uniform(0.88, 1.04)) for _ in story.cards]
    sigma = float(rng.uniform(0.0, 12.0))
    for card, shade in zip(story.cards, shades, strict=True):
        shown = np.flatnonzero((times >= card.start_seconds) & (times < card.end_seconds))
        if shown.size:
            mask = _mask(card, size)[None, :, :, None]  # [1, H, W, 1]
            color = np.asarray(_RGB[card.color], np.float32) * shade
            frames[shown] += mask * (color - frames[shown])
    noise = _noise(story.seed, times, frames.shape, sigma)
    pixels: NDArray[np.uint8] = np.clip(frames + noise, 0, 255).astype(np.uint8)
    return pixels


def _background(rng: np.random.Generator, times: NDArray[np.float64], size: int) -> Pixels:
    """[F, H, W, 3]: a muted colour under two gratings that drift with time."""
    axis = np.linspace(0.0, 1.0, size, dtype=np.float32)
    frames = np.empty((len(times), size, size, 3), np.float32)
    frames[:] = rng.uniform(50, 120) + rng.uniform(-22, 22, size=3)
    for _ in range(2):
        angle, waves = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 2.5)
        speed, phase = rng.uniform(-3, 3), rng.uniform(0, 6)
        tint = rng.uniform(-18, 18, size=3).astype(np.float32)
        plane = 2 * np.pi * waves * (np.cos(angle) * axis[None, :] + np.sin(angle) * axis[:, None])  # [H, W]
        drift = (speed * times + phase).astype(np.float32)  # [F]
        wave = np.sin(plane[None].astype(np.float32) + drift[:, None, None])  # [F, H, W]
        frames += wave[..., None] * tint
    return frames


def _noise(seed: int, times: NDArray[np.float64], shape: tuple[int, ...], sigma: float) -> Pixels:
    # Seeded by the first time too, so that a video written in pieces does not repeat its noise.
    rng = np.random.default_rng([seed, 2, int(times[0] * 1000)])
    return rng.standard_normal(shape, dtype=np.float32) * np.float32(sigma)


def _mask(card: Card, size: int) -> Pixels:
    """[H, W] coverage in 0…1 of the card's shape, one pixel of soft edge."""
    centres = (np.arange(size, dtype=np.float32) + 0.5) / size
    dx, dy = centres[None, :] - card.x, centres[:, None] - card.y
    inside = _distance(card.shape, dx / card.radius, dy / card.radius) * card.radius * size
    covered: Pixels = np.clip(0.5 - inside, 0.0, 1.0).astype(np.float32)
    return covered


def _distance(shape: str, x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
    """Signed distance to the outline of a shape of radius 1, negative inside."""
    r = np.sqrt(x * x + y * y)
    ax, ay = np.abs(x), np.abs(y)
    outlines: dict[str, NDArray[Any]] = {
        "circle": r - 1.0,
        "ring": np.abs(r - 0.78) - 0.24,
        "square": np.maximum(ax, ay) - 0.85,
        "diamond": (ax + ay - 1.1) * np.sqrt(0.5),
        "cross": np.minimum(np.maximum(ax - 1.0, ay - 0.32), np.maximum(ay - 1.0, ax - 0.32)),
        # Tip up: two flanks of slope 2 and a base.
        "triangle": np.maximum((2 * ax - y - 1.0) * 0.5 * np.sqrt(0.8), y - 0.85),
    }
    return outlines[shape]


SOURCE_FPS = 2.0  # frames per second of the file; sampled down to 1 by default
PICTURE = 64  # pixels
_PIECE = 256  # frames rendered at once


def write_film(story: Story, path: str | os.PathLike[str]) -> None:
    """Write a story as an MP4 file; one that is there is replaced. A VideoError where it cannot be written."""
    write_video(path, _frames(story), SOURCE_FPS)


def _frames(story: Story) -> Iterator[NDArray[np.uint8]]:
    total = round(story.duration_seconds * SOURCE_FPS)
    for start in range(0, total, _PIECE):
        times = np.arange(start, min(start + _PIECE, total)) / SOURCE_FPS
        yield from render(story, times, PICTURE).transpose(0, 3, 1, 2)  # [3, H, W] each
