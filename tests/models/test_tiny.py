"""The tiny checkpoints behave as models do: they answer, repeatably, and the answer depends on the video."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from tests import stock
from tests.tiny import FAMILIES, Tiny, tiny, video


def _inputs(model: Tiny, frames: torch.Tensor, question: str = "What happens in the video?") -> dict[str, Any]:
    content = [{"type": "video", "video": ""}, {"type": "text", "text": question}]
    text = model.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    metadata = {"total_num_frames": len(frames), "fps": 1.0, "frames_indices": list(range(len(frames)))}
    return dict(
        model.processor(
            text=[text],
            videos=[frames],
            video_metadata=[metadata],
            do_sample_frames=False,
            return_tensors="pt",
        )
    )


def _generate(model: Tiny, frames: torch.Tensor) -> list[int]:
    inputs = _inputs(model, frames)
    generate: Any = model.model.generate
    out = generate(**inputs, max_new_tokens=16, do_sample=False)
    found: list[int] = out[0, inputs["input_ids"].shape[1] :].tolist()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_generate_repeats_itself_and_sees_the_video(family: str) -> None:
    model = tiny(family)
    answers = [_generate(model, video(3, seed=seed)) for seed in range(3)]
    assert answers[:2] == [_generate(tiny(family), video(3, seed=seed)) for seed in range(2)]
    assert len({tuple(answer) for answer in answers}) == 3
    assert all(len(set(answer)) > 2 for answer in answers)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_far_from_uniform_and_from_ties(family: str) -> None:
    model = tiny(family)
    with torch.no_grad():
        logits = model.model(**_inputs(model, video(4))).logits[0, -1]
    best = logits.topk(2).values
    assert best[0] - best[1] > 1e-2
    assert logits.softmax(-1).max() > 10 / logits.numel()


@pytest.mark.parametrize("family", FAMILIES)
def test_seeds_and_speed(family: str) -> None:
    tiny(family)
    start = time.perf_counter()
    other = tiny(family, seed=1)
    assert time.perf_counter() - start < 1
    first, second = (dict(model.model.named_parameters()) for model in (tiny(family, seed=1), other))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], value) for name, value in tiny(family).model.named_parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_folder_loads_as_a_checkpoint(family: str, tmp_path: Path) -> None:
    model = tiny(family, max_position_embeddings=512)
    folder = model.save(tmp_path / "checkpoint")
    loaded = Tiny(family, AutoModelForImageTextToText.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
    assert loaded.config.text_config.max_position_embeddings == 512
    assert loaded.model.dtype == torch.float32
    saved, read = model.model.state_dict(), loaded.model.state_dict()
    assert saved.keys() == read.keys()
    assert all(torch.equal(saved[key], read[key]) for key in saved)
    assert loaded.model.generation_config.eos_token_id == model.tokenizer.eos_token_id
    text = "<|im_start|>user\nWhat is it?<|im_end|>"
    assert loaded.tokenizer(text)["input_ids"] == model.tokenizer(text)["input_ids"]
    processed = stock.processor(str(folder))
    assert type(processed) is type(model.processor)
    assert _generate(loaded, video(3)) == _generate(model, video(3))
