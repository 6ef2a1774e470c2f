"""Qwen3-VL: two frames make a step, positions have three axes, vision enters several layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from statekv.cache.stream import StreamState
from statekv.config import Config
from statekv.models.adapter import Segment
from tests.method.byhand import joined
from tests.talk import QUESTION, entering, frames_of, inputs_of, shared_engine, stock_model
from tests.tiny import video


def stream(layout: str = "hf") -> StreamState:
    return shared_engine("qwen3_vl").runner.open(Config(budget=100_000, layout=layout))


def entered(count: int, layout: str = "hf", fps: float = 1.0) -> list[Segment]:
    """The segments of a video and a question, as a stream makes them."""
    engine, state = shared_engine("qwen3_vl"), stream(layout)
    frames, found = frames_of(video(count), fps=fps), []
    with torch.inference_mode():
        for start in range(0, count, 2):
            step = entering(engine.model, frames[start : start + 2], state)
            for segment in step:
                engine.runner.enter(state, segment)
            found += step
        found.append(engine.model.question(QUESTION, state))
    return found


def text_of(segment: Segment) -> str:
    return str(shared_engine("qwen3_vl").model.tokenizer.decode(segment.ids[0]))


def stock_positions(inputs: dict[str, Any]) -> torch.Tensor:
    """[3, 1, T]"""
    names = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw")
    given = {name: inputs[name] for name in names if name in inputs}
    found: torch.Tensor = stock_model("qwen3_vl").model.model.get_rope_index(inputs["input_ids"], **given)[0]
    return found


def test_each_pair_of_frames_is_a_step_with_its_mean_time() -> None:
    picture = "<|vision_start|>" + "<|video_pad|>" * 8 + "<|vision_end|>"
    assert [(segment.kind, text_of(segment)) for segment in entered(5, fps=2.0)] == [
        ("prefix", "<|im_start|>user\n<|vision_start|>"),
        ("step", f"<0.2 seconds>{picture}"),
        ("step", f"<1.2 seconds>{picture}"),
        ("step", f"<2.0 seconds>{picture}"),
        ("question", f"<|vision_end|>{QUESTION}<|im_end|>\n<|im_start|>assistant\n"),
    ]


@pytest.mark.parametrize("count", [4, 5])
def test_together_they_are_the_stock_processors_input(count: int) -> None:
    inputs = inputs_of(stock_model("qwen3_vl"), video(count), QUESTION)
    segments = entered(count)
    assert torch.equal(torch.cat([segment.ids for segment in segments], dim=1), inputs["input_ids"])
    assert torch.equal(torch.cat([segment.positions for segment in segments], dim=-1), stock_positions(inputs))
    assert sum(segment.frames for segment in segments) == count


def test_golden_positions() -> None:
    """A picture of 2 × 4 merged patches takes 4 positions; time stands still in it, rows and columns count."""
    step = entered(2)[1]
    words = step.ids[0].tolist().index(stock_model("qwen3_vl").config.video_token_id)
    start = int(step.positions[0, 0, 0])
    first = start + words
    time, rows, columns = (axis.tolist() for axis in step.positions[:, 0, words:])
    assert step.positions[:, 0, :words].tolist() == [list(range(start, first))] * 3
    assert time == [first] * 8 + [first + 4]
    assert rows == [first] * 4 + [first + 1] * 4 + [first + 4]
    assert columns == [first, first + 1, first + 2, first + 3] * 2 + [first + 4]
    assert step.next_position == first + 5


def test_ready_made_inputs_are_cut_at_the_ends_of_pictures() -> None:
    inputs = inputs_of(stock_model("qwen3_vl"), "Look:", video(1)[0], "then", video(3), QUESTION)
    with torch.inference_mode():
        segments = list(shared_engine("qwen3_vl").model.segments(inputs))
    assert [segment.kind for segment in segments] == ["prefix", "step", "step", "step", "question"]
    assert torch.equal(torch.cat([segment.ids for segment in segments], dim=1), inputs["input_ids"])
    assert torch.equal(torch.cat([segment.positions for segment in segments], dim=-1), stock_positions(inputs))
    assert all(text_of(segment).endswith("<|vision_end|>") for segment in segments[1:-1])


def test_vision_of_one_step_is_that_of_the_whole_video() -> None:
    made = stock_model("qwen3_vl")
    inputs = inputs_of(made, video(6), QUESTION)
    with torch.no_grad():
        whole = made.model.model.get_video_features(
            inputs["pixel_values_videos"], inputs["video_grid_thw"], return_dict=True
        )
    steps = entered(6)[1:-1]
    spots = [step.ids == made.config.video_token_id for step in steps]
    seen = torch.cat([step.embeds[spot] for step, spot in zip(steps, spots, strict=True)])
    torch.testing.assert_close(seen, joined(whole.pooler_output), atol=1e-5, rtol=1e-5)
    for layer, feature in enumerate(whole.deepstack_features):
        deep = [step.extras["deepstack_visual_embeds"][layer] for step in steps]
        mine = torch.cat([found[spot] for found, spot in zip(deep, spots, strict=True)])
        assert not any(found[~spot].any() for found, spot in zip(deep, spots, strict=True))
        torch.testing.assert_close(mine, joined(feature), atol=1e-5, rtol=1e-5)


def test_entering_changes_nothing_in_the_stream() -> None:
    state = stream()
    with torch.inference_mode():
        first, again = (entering(shared_engine("qwen3_vl").model, frames_of(video(2)), state) for _ in range(2))
    assert [segment.ids.tolist() for segment in first] == [segment.ids.tolist() for segment in again]
    assert (state.tokens, state.position, state.frames, state.spans) == (0, 0, 0, [])


def test_a_known_number_of_frames_sets_the_size_as_in_stock() -> None:
    """The video's pixel budget is shared by its frames: few of them come in larger."""
    engine = shared_engine("qwen3_vl")
    recipe = engine.model.recipe  # type: ignore[attr-defined]
    sizes = []
    for expected in (2, None):
        state = engine.runner.open(Config(), frames_expected=expected)
        engine.model.recipe = type(recipe)(**{**vars(recipe), "shortest_edge": 16384})  # type: ignore[attr-defined]
        try:
            with torch.inference_mode():
                sizes.append(entering(engine.model, frames_of(video(2)), state)[-1].length)
        finally:
            engine.model.recipe = recipe  # type: ignore[attr-defined]
    assert sizes[0] > sizes[1]


@pytest.mark.parametrize("layout", ["hf", "release"])
@pytest.mark.parametrize("count", [1, 2, 9, 12])
def test_span_is_enough_and_not_wasteful(layout: str, count: int) -> None:
    taken = entered(count, layout)[-2].next_position
    promised = shared_engine("qwen3_vl").model.max_positions(count, 40, 56, layout)  # type: ignore[arg-type]
    assert taken <= promised <= taken + 8 * count
