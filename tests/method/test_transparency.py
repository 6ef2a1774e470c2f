"""With a budget for everything the answer is the stock model's: token for token, logits within 1e-4.

`statekv.generate` is compared in test_dropin.py; here are sessions, fed from a file and frame by frame.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from statekv.video.file import read_frames
from statekv.video.writer import write_video
from tests.talk import (
    QUESTION,
    TOLERANCE,
    UNLIMITED,
    Answer,
    assert_same_answer,
    frames_of,
    inputs_of,
    session_answer,
    shared_engine,
    stock_answer,
    stock_model,
)
from tests.tiny import EVERY_MODEL, FAMILIES, TWO_FAMILIES, Tiny, video

UNBOUNDED = (UNLIMITED, {"budget": 100_000})  # everything is carried; so much is that nothing is lost


def expected(made: Tiny, pictures: torch.Tensor, question: str = QUESTION, **times: Any) -> Answer:
    """The stock model's answer; it refuses a single frame for Qwen, which is then shown twice."""
    if len(pictures) == 1 and made.family == "qwen3_vl":
        return stock_answer(made, inputs_of(made, pictures.repeat(2, 1, 1, 1), question, indices=[0, 0]))
    return stock_answer(made, inputs_of(made, pictures, question, **times))


@pytest.mark.parametrize("family", EVERY_MODEL)
def test_pushed_frame_by_frame_and_asked_after_each(family: str) -> None:
    made, pictures = stock_model(family), video(5)
    sessions = [shared_engine(family).open(**settings) for settings in UNBOUNDED]
    for index, frame in enumerate(frames_of(pictures)):
        answer = expected(made, pictures[: index + 1])
        for session in sessions:
            session.push([frame])
            assert_same_answer(session_answer(session), answer)


@pytest.mark.parametrize(
    ("family", "frames"), [*((family, 7) for family in EVERY_MODEL), *((family, 4) for family in TWO_FAMILIES)]
)
def test_watched_from_a_file(family: str, frames: int, tmp_path: Path) -> None:
    made, path = stock_model(family), tmp_path / "clip.mp4"
    write_video(path, video(frames), fps=2)
    pictures = [frame.data for frame in read_frames(path, fps=2)]
    answer = expected(made, torch.stack(pictures), fps=2.0)
    for settings in UNBOUNDED:
        session = shared_engine(family).open(path, fps=2, **settings)
        session.watch()
        assert len(pictures) == frames == session.frames
        assert_same_answer(session_answer(session), answer)


@pytest.mark.parametrize("family", EVERY_MODEL)
def test_sampled_from_a_file_with_the_times_of_the_sampled_frames(family: str, tmp_path: Path) -> None:
    made, path = stock_model(family), tmp_path / "clip.mp4"
    write_video(path, video(26), fps=10)
    session = shared_engine(family).open(path, fps=2, **UNLIMITED)
    session.watch()
    frames = list(read_frames(path, fps=2))
    indices = [round(frame.pts_seconds * 10) for frame in frames]
    assert indices == [0, 5, 10, 15, 20, 25]
    pictures = torch.stack([frame.data for frame in frames])
    assert_same_answer(session_answer(session), expected(made, pictures, fps=10.0, indices=indices))


@pytest.mark.parametrize("family", EVERY_MODEL)
def test_a_stream_that_does_not_begin_at_zero_is_timed_from_its_first_frame(family: str) -> None:
    session = shared_engine(family).open(**UNLIMITED)
    session.push(frames_of(video(4), fps=2.0, start_seconds=1234.5))
    assert_same_answer(session_answer(session), expected(stock_model(family), video(4), fps=2.0))


@pytest.mark.parametrize("question", ["Was ist zu sehen? Größe, Straße", "\n  视频里有什么 ", "What? <img Frame9:"])
@pytest.mark.parametrize("family", EVERY_MODEL)
def test_any_question(family: str, question: str) -> None:
    session = shared_engine(family).open(**UNLIMITED)
    session.push(frames_of(video(3)))
    assert_same_answer(session_answer(session, question), expected(stock_model(family), video(3), question))


def test_a_file_longer_than_the_trained_length_is_scaled_once_for_its_horizon(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, video(9), fps=1)
    session = shared_engine("internvl", 64).open(path, **UNLIMITED)
    session.watch()
    horizon = session.state.horizon
    assert horizon > session.state.tokens > 64
    pictures = torch.stack([frame.data for frame in read_frames(path, fps=1)])
    made = stock_model("internvl", 64)
    inputs = inputs_of(made, pictures, QUESTION)
    with torch.no_grad():
        # One pass whose longest position is the horizon's last: stock scales for exactly that length.
        padded = {name: tensor for name, tensor in inputs.items() if name != "attention_mask"}
        length = inputs["input_ids"].shape[1]
        padding = torch.full((1, horizon - length), made.tokenizer.pad_token_id)
        padded["input_ids"] = torch.cat([inputs["input_ids"], padding], dim=1)
        logits = made.model(**padded).logits[0, length - 1]
    torch.testing.assert_close(session.logits(QUESTION)[0], logits, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(session_answer(session).logits[0], logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", EVERY_MODEL)
def test_layout_release_puts_the_frames_in_front_of_the_chat(family: str) -> None:
    made, pictures = stock_model(family), video(4)
    tile = "<img>" + "<IMG_CONTEXT>" * 4 + "</img>"
    texts = {
        "internvl": [f"{tile}\n"] * 4,
        "qwen3_vl": [
            f"<{seconds} seconds><|vision_start|>" + "<|video_pad|>" * 8 + "<|vision_end|>" for seconds in (0.5, 2.5)
        ],
        "qwen2_5_vl": ["<|vision_start|>" + "<|video_pad|>" * 16 + "<|vision_end|>"],
        "llava_onevision": ["<video>" * (4 * 9 + 1)],
        "eagle2_5": ["The first video: " + "".join(f"Frame {i + 1} sample at {i}.00s: {tile}" for i in range(4))],
    }[made.family]
    header = "<|im_start|>user\n\n" if family == "llava_onevision" else "<|im_start|>user\n"
    if family == "eagle2_5":
        header = f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{header}"
    tail = f"{header}{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    # Pixels as the stock processor makes them, text by hand.
    inputs = inputs_of(made, pictures, QUESTION)
    pieces = [
        made.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"] for text in [*texts, tail]
    ]
    inputs["input_ids"] = torch.cat(pieces, dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        spots = inputs["input_ids"] == made.config.video_token_id
        assert int(spots.sum()) == int(inputs["video_grid_thw"].prod()) // 4
        inputs["mm_token_type_ids"] = 2 * spots.int()
    session = shared_engine(family).open(layout="release", **UNLIMITED)
    session.push(frames_of(pictures))
    assert_same_answer(session_answer(session), stock_answer(made, inputs))


@pytest.mark.parametrize("settings", [{"kernel": "naive"}, {"kernel": "blocked"}, {"pin_prefix": True}])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_other_setting_matters_while_nothing_is_evicted(family: str, settings: dict[str, Any]) -> None:
    session = shared_engine(family).open(budget=100_000, **settings)
    session.push(frames_of(video(5)))
    assert_same_answer(session_answer(session), expected(stock_model(family), video(5)))
