"""Stories as real video files: H.264, one piece in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from statekv.evals.cards.render import render
from statekv.evals.cards.world import Story
from statekv.video.writer import write_video

SOURCE_FPS = 2.0  # frames per second of the file; sampled down to 1 by default
PICTURE = 64  # pixels
_PIECE = 256  # frames rendered at once


def write_film(story: Story, path: Path) -> None:
    """Write a story as an MP4 file.

    Raises:
        VideoError: the file cannot be written.
    """
    write_video(path, _frames(story), SOURCE_FPS)


def _frames(story: Story) -> Iterator[NDArray[np.uint8]]:
    total = round(story.duration_seconds * SOURCE_FPS)
    for start in range(0, total, _PIECE):
        times = np.arange(start, min(start + _PIECE, total)) / SOURCE_FPS
        yield from render(story, times, PICTURE).transpose(0, 3, 1, 2)  # [3, H, W] each
