"""Qwen2.5-VL: steps are bare, their time is a position, and text goes on as if the video were one picture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

import statekv
from statekv.cache.stream import StreamState
from statekv.config import Config
from statekv.errors import HorizonError
from statekv.models.adapter import Segment
from statekv.video.frame import Frame
from tests.method.byhand import joined
from tests.talk import (
    QUESTION,
    UNLIMITED,
    assert_same_answer,
    entering,
    frames_of,
    inputs_of,
    session_answer,
    shared_engine,
    some_frames,
    stock_answer,
    stock_model,
)
from tests.tiny import tiny, video

# Older ones drop the fraction of the seconds of a step before they count its positions.
STOCK_HAS_FRACTIONS = Version(transformers.__version__) >= Version("5.23")


def stream(layout: str = "hf") -> StreamState:
    return shared_engine("qwen2_5_vl").runner.open(Config(budget=100_000, layout=layout))


def entered(frames: list[Frame], layout: str = "hf") -> list[Segment]:
    """The segments of a video and a question, as a stream makes them."""
    engine, state = shared_engine("qwen2_5_vl"), stream(layout)
    found: list[Segment] = []
    with torch.inference_mode():
        for start in range(0, len(frames), 2):
            step = entering(engine.model, frames[start : start + 2], state)
            for segment in step:
                engine.runner.enter(state, segment)
            found += step
        found.append(engine.model.question(QUESTION, state))
    return found


def text_of(segment: Segment) -> str:
    return str(shared_engine("qwen2_5_vl").model.tokenizer.decode(segment.ids[0]))


def stock_positions(inputs: dict[str, Any]) -> torch.Tensor:
    """[3, 1, T]"""
    names = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    given = {name: inputs[name] for name in names if name in inputs}
    found: torch.Tensor = stock_model("qwen2_5_vl").model.model.get_rope_index(inputs["input_ids"], **given)[0]
    return found


def test_steps_are_bare_between_one_start_and_one_end() -> None:
    picture = "<|video_pad|>" * 8
    assert [(segment.kind, text_of(segment)) for segment in entered(some_frames(5))] == [
        ("prefix", "<|im_start|>user\n<|vision_start|>"),
        ("step", picture),
        ("step", picture),
        ("step", picture),
        ("question", f"<|vision_end|>{QUESTION}<|im_end|>\n<|im_start|>assistant\n"),
    ]


@pytest.mark.parametrize("fps", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("count", [1, 4, 5])
def test_together_they_are_the_stock_processors_input(count: int, fps: float) -> None:
    if fps > 2 and not STOCK_HAS_FRACTIONS:
        pytest.skip("stock has all steps at one time")
    inputs = inputs_of(stock_model("qwen2_5_vl"), video(count), QUESTION, fps=fps)
    segments = entered(frames_of(video(count), fps=fps))
    assert torch.equal(torch.cat([segment.ids for segment in segments], dim=1), inputs["input_ids"])
    assert torch.equal(torch.cat([segment.positions for segment in segments], dim=-1), stock_positions(inputs))
    assert sum(segment.frames for segment in segments) == count


def test_golden_positions() -> None:
    """Pictures of 2 × 4 tokens: rows and columns repeat, time counts 16 a second, text goes on 4 behind the start."""
    prefix, first, second, question = entered(frames_of(video(4), fps=2.0, start_seconds=7.3))
    start = prefix.length
    for step, moment in ((first, 0), (second, 16)):
        time, rows, columns = (axis.tolist() for axis in step.positions[:, 0])
        assert time == [start + moment] * 8
        assert rows == [start] * 4 + [start + 1] * 4
        assert columns == [start, start + 1, start + 2, start + 3] * 2
        assert (step.next_position, step.reach) == (start + 4, max(start + 4, start + moment + 1))
    assert question.positions[:, 0, 0].tolist() == [start + 4] * 3
    assert question.next_position == start + 4 + question.length


def test_time_is_the_clocks_where_frames_are_missing() -> None:
    times = [0.0, 0.5, 1.0, 1.5, 9.0, 9.5]
    frames = [Frame(picture, 100.0 + time) for picture, time in zip(video(6), times, strict=True)]
    first, second, third = entered(frames)[1:-1]
    start = int(first.positions[0, 0, 0])
    assert [int(step.positions[0, 0, 0]) - start for step in (first, second, third)] == [0, 16, 144]


@pytest.mark.parametrize("seconds", [0.1, 0.3, 1 / 3, 0.7])
def test_a_moment_does_not_hang_on_the_rounding_of_a_difference(seconds: float) -> None:
    """16 positions a second, and steps of a whole number of them."""
    model, state = shared_engine("qwen2_5_vl").model, stream()
    state.origin_seconds = 1234.0 + seconds
    for step in range(1, 200):
        seen = state.origin_seconds + step / 16
        assert model._moment(seen, state) == step  # type: ignore[attr-defined]


def test_ready_made_inputs_are_cut_at_the_ends_of_temporal_patches() -> None:
    content = ("Look:", video(1)[0], "then", video(3), "and", video(4, seed=1), QUESTION)
    inputs = inputs_of(stock_model("qwen2_5_vl"), *content)
    with torch.inference_mode():
        segments = list(shared_engine("qwen2_5_vl").model.segments(inputs))
    assert [segment.kind for segment in segments] == ["prefix", *["step"] * 5, "question"]
    assert torch.equal(torch.cat([segment.ids for segment in segments], dim=1), inputs["input_ids"])
    assert torch.equal(torch.cat([segment.positions for segment in segments], dim=-1), stock_positions(inputs))
    assert max(segment.reach for segment in segments) <= shared_engine("qwen2_5_vl").model.reach(inputs)
    ends = ["<|image_pad|>", *["<|video_pad|>"] * 4]
    assert all(text_of(segment).endswith(end) for segment, end in zip(segments[1:-1], ends, strict=True))


@pytest.mark.parametrize("seconds", [None, [0.37], [30.0]], ids=["stock's default", "fraction", "slow"])
def test_seconds_per_step_of_ready_made_inputs(seconds: list[float] | None) -> None:
    if seconds == [0.37] and not STOCK_HAS_FRACTIONS:
        pytest.skip("stock has all steps at one time")
    made = stock_model("qwen2_5_vl")
    inputs = inputs_of(made, video(8), QUESTION)
    inputs.pop("second_per_grid_ts")
    if seconds is not None:
        inputs["second_per_grid_ts"] = torch.tensor(seconds)
    with torch.inference_mode():
        segments = list(shared_engine("qwen2_5_vl").model.segments(inputs))
    assert torch.equal(torch.cat([segment.positions for segment in segments], dim=-1), stock_positions(inputs))


def test_generate_reaches_as_far_as_time_does() -> None:
    """Time may count far beyond the tokens and the trained length; stock goes on, and so does the drop-in."""
    made = tiny("qwen2_5_vl", max_position_embeddings=64)
    inputs = inputs_of(made, video(6), QUESTION, fps=0.1)
    expected = stock_answer(made, inputs)
    out = statekv.generate(made.model, **inputs, **UNLIMITED, max_new_tokens=6)
    assert out[0, inputs["input_ids"].shape[1] :].tolist() == expected.tokens  # type: ignore[index]


def test_a_stream_ends_where_its_time_passes_the_horizon() -> None:
    session = shared_engine("qwen2_5_vl").open(horizon=600, on_horizon="error", max_new_tokens=6, **UNLIMITED)
    session.push(frames_of(video(2)))
    with pytest.raises(HorizonError, match="position 486 is past 450"):
        session.push(frames_of(video(2), start_seconds=30.0))
    assert session.state.position < 20
    assert session.ask(QUESTION)


def test_vision_of_one_step_is_that_of_the_whole_video() -> None:
    """Windows in the tower lie within a picture, and so does full attention."""
    made = stock_model("qwen2_5_vl")
    inputs = inputs_of(made, video(6, height=72, width=90), QUESTION)
    with torch.no_grad():
        whole = made.model.model.get_video_features(
            inputs["pixel_values_videos"], inputs["video_grid_thw"], return_dict=True
        )
    steps = entered(frames_of(video(6, height=72, width=90)))[1:-1]
    seen = torch.cat([step.embeds[0] for step in steps])
    torch.testing.assert_close(seen, joined(whole.pooler_output), atol=1e-5, rtol=1e-5)


def test_a_long_video_of_which_little_is_kept_is_still_answered() -> None:
    session = shared_engine("qwen2_5_vl").open(budget=20)
    session.push(some_frames(30))
    assert session.state.carried.length == 20
    assert session.state.position == session.state.spans[0].length + 4


def test_an_answer_after_many_seconds_is_stocks() -> None:
    """The question's positions lie in the middle of the video's by then."""
    session = shared_engine("qwen2_5_vl").open(**UNLIMITED)
    session.push(some_frames(21))
    expected = stock_answer(stock_model("qwen2_5_vl"), inputs_of(stock_model("qwen2_5_vl"), video(21), QUESTION))
    assert_same_answer(session_answer(session), expected)


def test_entering_changes_nothing_in_the_stream() -> None:
    state = stream()
    with torch.inference_mode():
        first, again = (entering(shared_engine("qwen2_5_vl").model, some_frames(2), state) for _ in range(2))
    assert [segment.ids.tolist() for segment in first] == [segment.ids.tolist() for segment in again]
    assert (state.tokens, state.position, state.frames, state.spans) == (0, 0, 0, [])


@pytest.mark.parametrize("layout", ["hf", "release"])
@pytest.mark.parametrize("count", [1, 2, 9, 12])
def test_span_is_enough_and_not_wasteful(layout: str, count: int) -> None:
    taken = max(segment.reach for segment in entered(some_frames(count), layout)[:-1])
    promised = shared_engine("qwen2_5_vl").model.max_positions(count, 40, 56, layout, float(count))  # type: ignore[arg-type]
    assert taken <= promised <= taken + 2 * 16
    assert shared_engine("qwen2_5_vl").model.max_positions(count, 40, 56, layout) <= promised  # type: ignore[arg-type]
