"""A step with some of its tokens is the whole step with holes in it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from statekv.models.adapter import Segment, VideoModel
from statekv.models.encoded import EncodedStep
from tests.talk import inputs_of, shared_engine, some_frames, stock_model
from tests.tiny import EVERY_MODEL, video

EVERY_KIND = pytest.mark.parametrize("family", EVERY_MODEL)


def encoded(total: int = 6) -> EncodedStep:
    features = torch.arange(total * 2.0).view(total, 2)
    return EncodedStep((), features, (2, total // 2), (features + 100, features + 200))


def test_tokens_are_kept_by_mask_or_by_number_in_all_layers_alike() -> None:
    whole = encoded()
    mask = torch.tensor([False, True, False, True, True, False])
    for step in (whole.keep(mask), whole.keep(torch.tensor([1, 3, 4]))):
        assert step.kept is not None
        assert step.kept.tolist() == step.places.tolist() == [1, 3, 4]
        assert (step.total, step.grid) == (6, (2, 3))
        assert step.features.tolist() == whole.features[[1, 3, 4]].tolist()
        assert [layer.tolist() for layer in step.deepstack] == [(step.features + n).tolist() for n in (100, 200)]


def test_what_is_kept_of_what_was_kept_is_counted_in_the_whole_picture() -> None:
    step = encoded().keep(torch.tensor([1, 3, 4])).keep(torch.tensor([False, True, True]))
    assert step.places.tolist() == [3, 4]
    assert step.features.tolist() == encoded().features[[3, 4]].tolist()


def test_all_of_them_is_the_step_itself() -> None:
    whole = encoded()
    assert whole.keep(torch.ones(6, dtype=torch.bool)) is whole
    assert whole.places.tolist() == list(range(6))


def steps_of(family: str) -> tuple[VideoModel, list[EncodedStep], Any]:
    """Two steps as a stream gives them, and the stream behind the first."""
    engine = shared_engine(family)
    size = engine.model.frames_per_step
    frames, session = some_frames(2 * size), engine.open(budget=30)
    steps = engine.runner.encode([frames[:size], frames[size:]], None)
    session.push(frames[:size])
    return engine.model, steps, session.state


def of_tokens(segment: Segment) -> list[torch.Tensor]:
    """[1, T, hidden] each: embeddings, and what further layers add to them."""
    return [segment.embeds, *segment.extras.get("deepstack_visual_embeds", [])]


@EVERY_KIND
@torch.inference_mode()
def test_with_everything_kept_segments_are_what_they_were(family: str) -> None:
    model, steps, state = steps_of(family)
    for step, stream in zip(steps, (shared_engine(family).open(budget=30).state, state), strict=True):
        whole = model.segments_of(step, stream)
        said = model.segments_of(dataclasses.replace(step, kept=torch.arange(step.total)), stream)
        for mine, theirs in zip(said, whole, strict=True):
            assert torch.equal(mine.ids, theirs.ids)
            assert torch.equal(mine.positions, theirs.positions)
            assert all(torch.equal(a, b) for a, b in zip(of_tokens(mine), of_tokens(theirs), strict=True))
            assert (mine.next_position, mine.moment, mine.reach) == (theirs.next_position, theirs.moment, theirs.reach)


@EVERY_KIND
@torch.inference_mode()
def test_a_token_that_is_left_out_leaves_a_hole_and_moves_nothing(family: str) -> None:
    """Ids, embeddings, positions on every axis and deepstack features are those of the whole step without it."""
    model, steps, state = steps_of(family)
    step = steps[1]
    (whole,) = model.segments_of(step, state)
    first = whole.ids[0].tolist().index(model.video_token_id)
    for kept in ([0], [step.total - 1], [1, 2], list(range(1, step.total))):
        (segment,) = model.segments_of(step.keep(torch.tensor(kept)), state)
        words = [n for n in range(whole.length) if not first <= n < first + step.total]
        stay = sorted([*words, *(first + n for n in kept)])
        assert segment.ids.tolist() == whole.ids[:, stay].tolist()
        assert torch.equal(segment.positions, whole.positions[..., stay])
        for mine, theirs in zip(of_tokens(segment), of_tokens(whole), strict=True):
            assert torch.equal(mine, theirs[:, stay])
        assert segment.next_position == whole.next_position
        assert (segment.frames, segment.pts_seconds, segment.moment) == (whole.frames, whole.pts_seconds, whole.moment)
        assert segment.kept is not None
        assert segment.kept.tolist() == kept


@EVERY_KIND
@torch.inference_mode()
def test_a_processors_pictures_are_reduced_in_their_places(family: str) -> None:
    """Every step without its first token: all others, and the question, stand where they stood."""
    model = shared_engine(family).model
    inputs = inputs_of(stock_model(family), video(4), "What happens?")
    whole = list(model.segments(inputs))
    reduced = list(model.segments(inputs, lambda step: step.keep(torch.arange(1, step.total))))
    assert [segment.kind for segment in reduced] == [segment.kind for segment in whole]
    for mine, theirs in zip(reduced, whole, strict=True):
        first = theirs.ids[0].tolist().index(model.video_token_id) if theirs.kind == "step" else None
        stay = [n for n in range(theirs.length) if n != first]
        assert mine.ids.tolist() == theirs.ids[:, stay].tolist()
        assert torch.equal(mine.positions, theirs.positions[..., stay])
        assert torch.equal(mine.embeds, theirs.embeds[:, stay])
        assert mine.next_position == theirs.next_position
