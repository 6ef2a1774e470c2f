"""Which patch is held: the right token, the right rectangle, the right moment."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from statekv.analysis.holdings import MOST_MOMENTS, Holdings, held_shares, reduced, token_grid
from statekv.errors import ModelError
from statekv.models.base import Seen, VideoModel
from statekv.video.frame import Frame
from tests.talk import shared_engine, some_frames
from tests.tiny import FAMILIES

EVERY_FAMILY = pytest.mark.parametrize("family", [*FAMILIES, "eagle2_5"])


def grid_of(seen: Seen) -> tuple[int, int]:
    return token_grid(len(seen.features), seen.grid)


@pytest.mark.parametrize(
    ("tokens", "patches", "expected"),
    [(4, (0, 0), (2, 2)), (196, (0, 0), (14, 14)), (6, (4, 6), (2, 3)), (24, (4, 6), (4, 6)), (5, (2, 10), (1, 5))],
)
def test_tokens_make_a_grid(tokens: int, patches: tuple[int, int], expected: tuple[int, int]) -> None:
    assert token_grid(tokens, patches) == expected


@pytest.mark.parametrize(("tokens", "patches"), [(5, (0, 0)), (0, (0, 0)), (7, (4, 6)), (0, (4, 6))])
def test_tokens_that_make_no_grid_are_refused(tokens: int, patches: tuple[int, int]) -> None:
    with pytest.raises(ModelError, match="make no grid"):
        token_grid(tokens, patches)


def features(model: VideoModel, frames: list[Frame]) -> tuple[Any, tuple[int, int]]:
    with torch.inference_mode():
        (seen,) = model.look([frames])
    return seen.features, grid_of(seen)


@EVERY_FAMILY
def test_a_tokens_rectangle_is_where_its_pixels_are(family: str) -> None:
    """Pixels are changed inside one rectangle: the token that changes most is the one that is drawn there."""
    model = shared_engine(family).model
    height, width = 64, 96
    grey = torch.full((3, height, width), 90, dtype=torch.uint8)
    frames = [Frame(grey, float(i)) for i in range(model.frames_per_step)]
    before, (rows, columns) = features(model, frames)
    assert rows * columns > 1
    for row in range(rows):
        for column in range(columns):
            lit = grey.clone()
            y = slice(height * row // rows, height * (row + 1) // rows)
            x = slice(width * column // columns, width * (column + 1) // columns)
            lit[:, y, x] = 250
            changed = [Frame(lit, frame.pts_seconds) for frame in frames]
            after, _ = features(model, changed)
            assert int((after - before).norm(dim=-1).argmax()) == row * columns + column


def entered(family: str, frames: int, expected: int, **settings: Any) -> tuple[Holdings, Any]:
    """A stream of random frames and what looks into it, step by step."""
    session = shared_engine(family).open(**settings)
    state, stepper = session.state, session.stepper
    found, pictures, size = Holdings(range(3), expected), some_frames(frames), stepper.model.frames_per_step
    with torch.inference_mode():
        for start in range(0, frames, size):
            (seen,) = stepper.model.look([pictures[start : start + size]], state.frames_expected)
            for segment in stepper.model.enter(seen, state):
                first = state.tokens
                stepper.prefill(state, segment)
                if segment.kind == "step":
                    found.enter(seen, segment, first, stepper.model.video_token_id)
            found.look(state.carried, state.tokens)  # type: ignore[arg-type]
    return found, state


@EVERY_FAMILY
def test_the_tokens_of_a_picture_are_its_placeholders_in_the_stream(family: str) -> None:
    found, state = entered(family, 6, 6, budget=1000)
    spans = [span for span in state.spans if span.kind == "step"]
    assert [picture.pts_seconds for picture in found.pictures] == [span.pts_seconds for span in spans]
    for picture, span in zip(found.pictures, spans, strict=True):
        assert span.start <= picture.tokens.min()
        assert picture.tokens.max() < span.start + span.length
        assert (np.diff(picture.tokens.flatten()) == 1).all()
    assert found.moments[-1].frames.tolist() == [1] * len(found.pictures)
    held_text = state.tokens - sum(picture.tokens.size for picture in found.pictures)
    assert found.moments[-1].text == pytest.approx(held_text / state.tokens)


@EVERY_FAMILY
def test_the_one_kept_token_is_drawn_at_its_row_and_column(family: str) -> None:
    found, state = entered(family, 6, 6, budget=1)
    picture = found.pictures[1]
    rows, columns = picture.tokens.shape
    token = int(picture.tokens[rows - 1, 0])
    state.carried.born = [torch.full_like(born, token) for born in state.carried.born]
    found.moments.clear()
    found.finish(state.carried, state.tokens)
    (moment,) = found.moments
    expected = np.zeros((rows, columns))
    expected[rows - 1, 0] = 1
    assert np.array_equal(moment.patches[1], expected)
    assert not any(patches.any() for step, patches in enumerate(moment.patches) if step != 1)
    assert moment.frames[1] == pytest.approx(1 / (rows * columns))
    assert moment.text == 0


def test_shares_count_layers_and_heads() -> None:
    kept = [torch.tensor([[[0, 2], [2, 3]]], dtype=torch.int32), torch.tensor([[[2, 3], [0, 1]]], dtype=torch.int32)]
    assert held_shares(kept, 5).tolist() == [0.5, 0.25, 0.75, 0.5, 0]


def test_long_streams_are_looked_at_now_and_then_and_at_their_end() -> None:
    found, state = entered("internvl", 9, 2 * MOST_MOMENTS, budget=10)
    found.finish(state.carried, state.tokens)
    assert [moment.step for moment in found.moments] == [0, 2, 4, 6, 8]
    found, state = entered("internvl", 4, 3 * MOST_MOMENTS, budget=10)
    assert [moment.step for moment in found.moments] == [0, 3]
    found, state = entered("internvl", 3, 3 * MOST_MOMENTS, budget=10)
    found.finish(state.carried, state.tokens)
    assert [moment.step for moment in found.moments] == [0, 2]


def test_pictures_are_reduced_without_changing_their_shape() -> None:
    pixels = torch.arange(3 * 300 * 500).view(3, 300, 500).to(torch.uint8)
    small = reduced(pixels)
    assert small.shape == (75, 125, 3)
    assert small[10, 20].tolist() == pixels[:, 40, 80].tolist()
    assert reduced(pixels[:, :50, :60]).shape == (50, 60, 3)
