"""Which patch is held: the right token, the right rectangle, the right moment."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from statekv.analysis.concentration import BUDGETS
from statekv.analysis.holdings import MOST_MOMENTS, Holdings, analyse, held_shares, reduced, watch
from statekv.errors import ConfigError, VideoError
from statekv.evals.cards.render import write_film
from statekv.evals.cards.world import FIRST_TEST_SEED, write_story
from statekv.models.adapter import VideoModel
from statekv.video.frame import Frame
from tests.analysis.streams import opened, watched
from tests.presets import filled
from tests.runner.test_cuda_graph import Tape
from tests.runner.test_cuda_graph import session as recorded_session
from tests.talk import assert_same_memory, assert_same_stream, entering, memory, shared_engine, some_frames
from tests.tiny import FAMILIES

EVERY_FAMILY = pytest.mark.parametrize("family", [*FAMILIES, "eagle2_5"])


def features(model: VideoModel, frames: list[Frame]) -> tuple[Any, tuple[int, int]]:
    with torch.inference_mode():
        (seen,) = model.encode([frames])
    return seen.features, seen.grid


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
    state, runner = session.state, session.runner
    found, pictures, size = Holdings(range(3), expected), some_frames(frames), runner.model.frames_per_step
    with torch.inference_mode():
        for start in range(0, frames, size):
            (seen,) = runner.encode([pictures[start : start + size]], state.frames_expected)
            for segment in runner.segments_of(state, seen):
                first = state.tokens
                runner.enter(state, segment)
                if segment.kind == "step":
                    found.enter(seen, segment, first, runner.model.video_token_id)
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
    state.carried.token_ids = [torch.full_like(token_ids, token) for token_ids in state.carried.token_ids]
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


EVERY_FAMILY_WATCHING = pytest.mark.parametrize("family", FAMILIES)


@EVERY_FAMILY_WATCHING
def test_a_session_that_is_looked_into_equals_one_that_is_not(family: str) -> None:
    found, plain = opened(family, 8, budget=20), opened(family, 8, budget=20)
    watch(found, range(3), 8)
    plain.push(some_frames(8))
    assert_same_stream(found, plain)


@EVERY_FAMILY_WATCHING
@pytest.mark.parametrize("carry", ["all", "attention", "random"])
def test_an_observer_changes_nothing_and_is_told_the_key_scores(family: str, carry: str) -> None:
    engine = shared_engine(family)
    observed, plain = (engine.open(**filled({"carry": carry}, budget=20)) for _ in range(2))
    model, told = engine.model, list[tuple[int, torch.Tensor]]()
    with torch.inference_mode():
        for frames in zip(*[iter(some_frames(6))] * model.frames_per_step, strict=True):
            for segment in entering(model, frames, plain.state):
                seen = min(plain.state.carried.length, 20 if carry != "all" else 10_000) + segment.length
                told.clear()
                engine.runner.enter(
                    observed.state, segment, observer=lambda layer, scores: told.append((layer, scores))
                )
                engine.runner.enter(plain.state, segment)
                assert [layer for layer, _ in told] == [0, 1, 2]
                for _, scores in told:
                    assert scores.shape == (1, 2, seen)
                    # Two query heads share a KV head.
                    assert scores.sum(-1).flatten().tolist() == pytest.approx([2 * segment.length] * 2, rel=1e-4)
    assert_same_memory(memory(observed), memory(plain))


def test_an_observed_step_is_not_replayed_from_a_recording() -> None:
    tape = Tape()
    plain = recorded_session("internvl", tape)
    plain.push(some_frames(12))
    assert tape.replayed
    replayed, model = tape.replayed, plain.runner.model
    told: list[int] = []
    with torch.inference_mode():
        (segment,) = entering(model, some_frames(1, seed=4), plain.state)
        plain.runner.enter(plain.state, segment, observer=lambda layer, _: told.append(layer))
    assert (tape.replayed, told) == (replayed, [0, 1, 2])


@EVERY_FAMILY_WATCHING
def test_an_unlimited_budget_holds_and_captures_everything(family: str) -> None:
    found = watched(family, 8, budget=10_000)
    assert found.budget > found.tokens
    for row in found.shares:
        assert (row.best, row.carried) == pytest.approx((1, 1))
        for index, budget in enumerate(BUDGETS):
            if budget >= found.tokens:
                assert row.captured[index] == pytest.approx(1)
                assert row.recall[index] == pytest.approx(1)
                assert row.churn[index] == 0
    assert all((moment.frames == 1).all() for moment in found.moments)


@EVERY_FAMILY_WATCHING
def test_a_small_cache_captures_less_than_the_best_choice_and_that_less_than_all(family: str) -> None:
    found = watched(family, 10, budget=12)
    assert (found.frames, found.steps) == (10, 10 // shared_engine(family).model.frames_per_step)
    assert [row.layer for row in found.shares] == [0, 1, 2]
    for row in found.shares:
        assert 0 < row.carried <= row.best < 1
        assert list(row.captured) == sorted(row.captured)
    mean = found.mean_shares()
    assert mean.carried == pytest.approx(sum(row.carried for row in found.shares) / 3)
    assert mean.captured[2] == pytest.approx(sum(row.captured[2] for row in found.shares) / 3)


def test_a_frame_that_lacks_its_partner_is_left_out() -> None:
    assert watched("qwen3_vl", 7, budget=20).frames == 6


def test_layers_can_be_chosen() -> None:
    session = opened("internvl", 6, budget=12)
    found = watch(session, [2], 6)
    every = watched("internvl", 6, budget=12)
    assert [row.layer for row in found.shares] == [2]
    assert found.shares[0] == every.shares[2]


def test_progress_is_told_after_each_step() -> None:
    told: list[int] = []
    watch(opened("qwen3_vl", 6, budget=20), range(3), 6, told.append)
    assert told == [2, 4, 6]


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    write_film(write_story(FIRST_TEST_SEED, 12), path)
    return path


def test_a_file_is_watched_up_to_its_cap(film: Path) -> None:
    found = analyse(shared_engine("internvl"), film, max_frames=5, layers=[1, 0, 1])
    assert found.frames == 5
    assert [row.layer for row in found.shares] == [0, 1]


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_that_is_not_there_is_refused(film: Path, layer: int) -> None:
    with pytest.raises(ConfigError, match=f"layer {layer} is not there, the model has 0 to 2"):
        analyse(shared_engine("internvl"), film, max_frames=5, layers=[layer])


@pytest.mark.parametrize(("family", "needed"), [("internvl", 3), ("qwen2_5_vl", 6)])
def test_a_video_of_two_steps_is_refused(family: str, needed: int, film: Path) -> None:
    with pytest.raises(VideoError, match=f"must be at least {needed}"):
        analyse(shared_engine(family), film, max_frames=needed - 1)
    found = analyse(shared_engine(family), film, max_frames=needed).mean_shares()
    assert not any(math.isnan(share) for share in (*found.captured, *found.recall, *found.churn))


def test_without_a_carried_cache_there_is_nothing_to_look_into(film: Path) -> None:
    engine = shared_engine("internvl")
    before = engine.config
    try:
        engine.config = before.with_("full")
        with pytest.raises(ConfigError, match="nothing to look into"):
            analyse(engine, film, max_frames=5)
    finally:
        engine.config = before
