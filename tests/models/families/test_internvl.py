"""InternVL: one frame is one step, one token is one position."""

from __future__ import annotations

import pytest
import torch

from statekv.cache.stream import StreamState
from statekv.config import Config
from statekv.models.adapter import Segment
from tests.talk import QUESTION, entering, inputs_of, shared_engine, some_frames, stock_model
from tests.tiny import video


def stream(layout: str = "hf") -> StreamState:
    return shared_engine("internvl").runner.open(Config(budget=100_000, layout=layout))


def entered(count: int, layout: str = "hf") -> list[Segment]:
    """The segments of a video and a question, as a stream makes them."""
    engine, state = shared_engine("internvl"), stream(layout)
    found: list[Segment] = []
    with torch.inference_mode():
        for frame in some_frames(count):
            step = entering(engine.model, [frame], state)
            for segment in step:
                engine.runner.enter(state, segment)
            found += step
        found.append(engine.model.question(QUESTION, state))
    return found


def text_of(segment: Segment) -> str:
    return str(shared_engine("internvl").model.tokenizer.decode(segment.ids[0]))


def test_each_frame_is_a_step_with_its_label() -> None:
    picture = "<img>" + "<IMG_CONTEXT>" * 4 + "</img>"
    assert [(segment.kind, text_of(segment)) for segment in entered(3)] == [
        ("prefix", "<|im_start|>user\n"),
        ("step", f"Frame1: {picture}"),
        ("step", f"\nFrame2: {picture}"),
        ("step", f"\nFrame3: {picture}"),
        ("question", f"\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"),
    ]


def test_layout_release_has_no_labels_and_no_prefix() -> None:
    picture = "<img>" + "<IMG_CONTEXT>" * 4 + "</img>\n"
    assert [(segment.kind, text_of(segment)) for segment in entered(2, "release")] == [
        ("step", picture),
        ("step", picture),
        ("question", f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"),
    ]


def test_together_they_are_the_stock_processors_input() -> None:
    inputs = inputs_of(stock_model("internvl"), video(12), QUESTION)
    segments = entered(12)
    assert torch.equal(torch.cat([segment.ids for segment in segments], dim=1), inputs["input_ids"])
    assert torch.equal(
        torch.cat([segment.positions for segment in segments], dim=1), torch.arange(inputs["input_ids"].shape[1])[None]
    )
    assert [segment.frames for segment in segments] == [0] + [1] * 12 + [0]
    assert [segment.pts_seconds for segment in segments] == [None, *map(float, range(12)), None]


def test_ready_made_inputs_are_cut_at_the_ends_of_pictures() -> None:
    inputs = inputs_of(stock_model("internvl"), "Look:", video(1)[0], "then", video(2), QUESTION)
    with torch.inference_mode():
        segments = list(shared_engine("internvl").model.segments(inputs))
    assert [segment.kind for segment in segments] == ["prefix", "step", "step", "step", "question"]
    assert torch.equal(torch.cat([segment.ids for segment in segments], dim=1), inputs["input_ids"])
    assert all(text_of(segment).endswith("</img>") for segment in segments[1:-1])


def test_both_doors_give_the_same_embeddings() -> None:
    inputs = inputs_of(stock_model("internvl"), video(3), QUESTION)
    with torch.inference_mode():
        ready = torch.cat([segment.embeds for segment in shared_engine("internvl").model.segments(inputs)], dim=1)
    streamed = torch.cat([segment.embeds for segment in entered(3)], dim=1)
    torch.testing.assert_close(ready, streamed, atol=1e-6, rtol=0)


def test_entering_changes_nothing_in_the_stream() -> None:
    state = stream()
    with torch.inference_mode():
        first, again = (entering(shared_engine("internvl").model, some_frames(1), state) for _ in range(2))
    assert [segment.ids.tolist() for segment in first] == [segment.ids.tolist() for segment in again]
    assert (state.tokens, state.position, state.frames, state.spans) == (0, 0, 0, [])


@pytest.mark.parametrize("layout", ["hf", "release"])
@pytest.mark.parametrize("count", [1, 9, 12])
def test_span_is_enough_and_not_wasteful(layout: str, count: int) -> None:
    taken = entered(count, layout)[-2].next_position
    promised = shared_engine("internvl").model.max_positions(count, 40, 56, layout)  # type: ignore[arg-type]
    assert taken <= promised <= taken + 20
