"""LLaVA-OneVision: one frame is one step of bare tokens, and the newline behind the last one enters with the text."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import statekv
from statekv.cache.stream import StreamState
from statekv.config import Config
from statekv.errors import ModelError
from statekv.models.adapter import Segment
from tests.talk import (
    QUESTION,
    UNLIMITED,
    Answer,
    assert_same_answer,
    entering,
    inputs_of,
    shared_engine,
    some_frames,
    stock_answer,
    stock_model,
)
from tests.tiny import video

FAMILY = "llava_onevision"


def stream(layout: str = "hf") -> StreamState:
    return shared_engine(FAMILY).runner.open(Config(budget=100_000, layout=layout))


def entered(count: int, layout: str = "hf") -> list[Segment]:
    """The segments of a video and a question, as a stream makes them."""
    engine, state = shared_engine(FAMILY), stream(layout)
    found: list[Segment] = []
    with torch.inference_mode():
        for frame in some_frames(count):
            step = entering(engine.model, [frame], state)
            for segment in step:
                engine.runner.enter(state, segment)
            found += step
        found.append(engine.model.question(QUESTION, state))
    return found


def segments_of(inputs: dict[str, Any]) -> list[Segment]:
    with torch.inference_mode():
        return list(shared_engine(FAMILY).model.segments(inputs))


def text_of(segment: Segment) -> str:
    return str(shared_engine(FAMILY).model.tokenizer.decode(segment.ids[0]))


def newline() -> torch.Tensor:
    found: torch.Tensor = stock_model(FAMILY).model.model.image_newline
    return found.detach()


def generated(inputs: dict[str, Any]) -> Answer:
    out: Any = statekv.generate(
        stock_model(FAMILY).model,
        **inputs,
        **UNLIMITED,
        max_new_tokens=6,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return Answer(out.sequences[0, inputs["input_ids"].shape[1] :].tolist(), torch.cat(out.logits))


def test_frames_are_bare_and_the_newline_enters_with_the_question() -> None:
    segments = entered(2)
    assert [(segment.kind, text_of(segment)) for segment in segments] == [
        ("prefix", "<|im_start|>user\n"),
        ("step", "<video>" * 9),
        ("step", "<video>" * 9),
        ("question", f"<video>\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"),
    ]
    assert torch.equal(segments[-1].embeds[0, 0], newline())
    with torch.inference_mode():
        words = shared_engine(FAMILY).model.embed(segments[-1].ids)
    assert torch.equal(segments[-1].embeds[0, 1:], words[0, 1:])


def test_layout_release_has_no_prefix() -> None:
    assert [(segment.kind, text_of(segment)) for segment in entered(2, "release")] == [
        ("step", "<video>" * 9),
        ("step", "<video>" * 9),
        ("question", f"<video><|im_start|>user\n\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"),
    ]


def test_together_they_are_the_stock_processors_input() -> None:
    inputs = inputs_of(stock_model(FAMILY), video(12), QUESTION)
    segments = entered(12)
    assert torch.equal(torch.cat([segment.ids for segment in segments], dim=1), inputs["input_ids"])
    assert torch.equal(
        torch.cat([segment.positions for segment in segments], dim=1), torch.arange(inputs["input_ids"].shape[1])[None]
    )
    assert [segment.frames for segment in segments] == [0] + [1] * 12 + [0]
    assert [segment.pts_seconds for segment in segments] == [None, *map(float, range(12)), None]


def test_vision_of_one_step_is_that_of_the_whole_video() -> None:
    made = stock_model(FAMILY)
    model: Any = made.model
    inputs = inputs_of(made, video(5), QUESTION)
    with torch.no_grad():
        whole = model.get_video_features(inputs["pixel_values_videos"], return_dict=True).pooler_output[0]
    steps = torch.cat([segment.embeds[0] for segment in entered(5)[1:-1]])
    torch.testing.assert_close(steps, whole[: len(steps)], atol=1e-5, rtol=1e-5)
    assert len(steps) == 5 * 9


def test_both_doors_give_the_same_embeddings() -> None:
    ready = segments_of(inputs_of(stock_model(FAMILY), video(3), QUESTION))
    streamed = entered(3)
    assert [segment.ids.tolist() for segment in ready] == [segment.ids.tolist() for segment in streamed]
    for mine, other in zip(ready, streamed, strict=True):
        torch.testing.assert_close(mine.embeds, other.embeds, atol=1e-6, rtol=0)


def test_pictures_side_by_side_are_cut_apart() -> None:
    """The chat template moves all pictures to the front; a video's newline goes to whatever follows it."""
    inputs = inputs_of(stock_model(FAMILY), video(2), QUESTION, video(1)[0], video(2, seed=1), video(2)[1])
    segments = segments_of(inputs)
    assert [segment.kind for segment in segments] == ["prefix", *["step"] * 6, "question"]
    assert torch.equal(torch.cat([segment.ids for segment in segments], dim=1), inputs["input_ids"])
    assert [segment.length for segment in segments[3:]][:4] == [9, 9, 10, 9]
    for late in (segments[5], segments[7]):
        assert torch.equal(late.embeds[0, 0], newline())


@pytest.mark.parametrize("size", [(40, 40), (40, 56), (90, 70), (30, 200)])
def test_images_are_tiled_as_in_stock(size: tuple[int, int]) -> None:
    made = stock_model(FAMILY)
    inputs = inputs_of(made, video(1, *size)[0], video(1, 77, 33, seed=1)[0], QUESTION)
    assert_same_answer(generated(inputs), stock_answer(made, inputs))
    assert [segment.kind for segment in segments_of(inputs)] == ["prefix", "step", "step", "question"]


def test_several_images_of_one_conversation_are_not_tiled() -> None:
    """So the stock processor says by `batch_num_images` where images are given as a list for each conversation."""
    made = stock_model(FAMILY)
    images = [[video(1)[0], video(1, 77, 33, seed=1)[0]]]
    text = f"<|im_start|>user\n<image><image>\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    inputs = dict(made.processor(text=[text], images=images, return_tensors="pt"))
    assert inputs["batch_num_images"].tolist() == [2]
    assert [segment.length for segment in segments_of(inputs)[1:-1]] == [26, 26]
    assert_same_answer(generated(inputs), stock_answer(made, inputs))


def test_pictures_that_do_not_fill_the_text_are_refused_before_anything_is_answered() -> None:
    made = stock_model(FAMILY)
    few, many = (inputs_of(made, video(1)[0], video(frames), QUESTION) for frames in (2, 3))
    for ids, pictures in ((few, many), (many, few)):
        with pytest.raises(ModelError, match="placeholders"):
            segments_of({**pictures, "input_ids": ids["input_ids"]})
    image = inputs_of(made, video(1)[0], QUESTION)
    with pytest.raises(ModelError, match="placeholders"):
        segments_of({**image, "pixel_values_videos": few["pixel_values_videos"]})


def test_entering_changes_nothing_in_the_stream() -> None:
    state = stream()
    with torch.inference_mode():
        first, again = (entering(shared_engine(FAMILY).model, some_frames(1), state) for _ in range(2))
    assert [segment.ids.tolist() for segment in first] == [segment.ids.tolist() for segment in again]
    assert (state.tokens, state.position, state.frames, state.spans) == (0, 0, 0, [])


@pytest.mark.parametrize("layout", ["hf", "release"])
@pytest.mark.parametrize("count", [1, 9])
def test_span_is_exact(layout: str, count: int) -> None:
    taken = entered(count, layout)[-2].next_position
    assert shared_engine(FAMILY).model.max_positions(count, 40, 56, layout) == taken  # type: ignore[arg-type]
