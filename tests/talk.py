"""Conversations about random videos: the stock way, and through an engine on a tiny checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from statekv.cache.stream import StreamState
from statekv.config import Config
from statekv.engine.engine import Engine
from statekv.engine.session import Session
from statekv.models import adapter_of
from statekv.models.adapter import Segment, Texts, VideoModel
from statekv.runner.decoding import SamplingParams
from statekv.runner.runner import ModelRunner
from statekv.video.frame import Frame
from tests.runner.tower import remember
from tests.tiny import Tiny, tiny, video

QUESTION = "What happens in the video?"
UNLIMITED: dict[str, Any] = {"carry": "all"}
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Answer:
    """Tokens, end of turn included, and the logits that each was chosen from, [tokens, vocabulary]."""

    tokens: list[int]
    logits: torch.Tensor


@functools.cache
def stock_model(family: str, max_position_embeddings: int = 4096) -> Tiny:
    """A tiny model that no engine ever touches; shared, to be left as found."""
    return tiny(family, max_position_embeddings=max_position_embeddings)


def adapted(made: Tiny) -> VideoModel:
    texts = Texts(made.tokenizer, made.chat_template, made.video_json)
    return adapter_of(made.config.model_type)(made.model, texts)


@functools.cache
def shared_engine(family: str, max_position_embeddings: int = 4096) -> Engine:
    """An engine with the weights of `stock_model`; greedy, short answers, each picture looked at once."""
    made = tiny(family, max_position_embeddings=max_position_embeddings)
    remember(made.tower)
    return Engine(adapted(made), Config(max_new_tokens=6))


def inputs_of(
    made: Tiny, *content: str | torch.Tensor, fps: float = 1.0, indices: Sequence[int] | None = None
) -> dict[str, Any]:
    """What the stock processor makes of one user turn: texts, images [3, H, W] and videos [N, 3, H, W]."""
    parts: list[dict[str, str]] = []
    images: list[torch.Tensor] = []
    videos: list[torch.Tensor] = []
    for piece in content:
        if isinstance(piece, str):
            parts.append({"type": "text", "text": piece})
            continue
        kind = "video" if piece.ndim == 4 else "image"
        parts.append({"type": kind, kind: ""})
        (videos if kind == "video" else images).append(piece)
    text = made.processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    vision: dict[str, Any] = {"images": images} if images else {}
    if videos:
        told = [_metadata(fps, list(indices or range(len(v)))) for v in videos]
        vision |= {"videos": videos, "video_metadata": told, "do_sample_frames": False}
    return dict(made.processor(text=[text], return_tensors="pt", **vision))


def _metadata(fps: float, indices: list[int]) -> dict[str, Any]:
    # Qwen2.5-VL's processor takes the frame rate after sampling from the share of frames that were taken.
    step = indices[1] - indices[0] if len(indices) > 1 else 1
    return {"total_num_frames": max(1, step) * len(indices), "fps": fps, "frames_indices": indices}


def stock_answer(made: Tiny, inputs: dict[str, Any], max_new_tokens: int = 6) -> Answer:
    model: Any = made.model
    out = model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    return Answer(out.sequences[0, -len(out.logits) :].tolist(), torch.cat(out.logits))


def stock_ids(made: Tiny, inputs: dict[str, Any], **parameters: Any) -> torch.Tensor:
    """What `generate` returns without more ado."""
    model: Any = made.model
    found: torch.Tensor = model.generate(**inputs, **parameters)
    return found


def entering(model: VideoModel, frames: Sequence[Frame], state: StreamState) -> list[Segment]:
    """Segments of one step."""
    (seen,) = model.encode([frames], state.frames_expected)
    return model.segments_of(seen, state)


def frames_of(pictures: torch.Tensor, fps: float = 1.0, start_seconds: float = 0.0) -> list[Frame]:
    return [Frame(picture, start_seconds + index / fps, 1 / fps) for index, picture in enumerate(pictures)]


def some_frames(count: int, seed: int = 0) -> list[Frame]:
    return frames_of(video(count, seed=seed))


class Recorder(ModelRunner):
    """A stepper that remembers the tokens and logits of its last answer."""

    last: Answer

    def decode(
        self, state: StreamState, logits: torch.Tensor, sampling: SamplingParams, prompt: torch.Tensor
    ) -> Iterator[tuple[int, torch.Tensor]]:
        found = list(super().decode(state, logits, sampling, prompt))
        self.last = Answer([token for token, _ in found], torch.cat([logits for _, logits in found]))
        yield from found


def decoded(
    runner: ModelRunner, state: StreamState, question: Segment, sampling: SamplingParams
) -> list[tuple[int, torch.Tensor]]:
    """Tokens of an answer and the logits that they were chosen from; it stays in the stream."""
    logits = runner.ask(state, question, sampling.max_new_tokens)
    return list(runner.decode(state, logits, sampling, question.ids))


def session_answer(session: Session, question: str = QUESTION, max_new_tokens: int = 6) -> Answer:
    """What `ask` decodes, as tokens and logits."""
    before, recorder = session.runner, Recorder(session.runner.model)
    session.runner = recorder
    try:
        text = session.ask(question, max_new_tokens=max_new_tokens)
    finally:
        session.runner = before
    assert text == session.runner.model.tokenizer.decode(recorder.last.tokens, skip_special_tokens=True)
    return recorder.last


def assert_same_answer(found: Answer, expected: Answer) -> None:
    assert found.tokens == expected.tokens
    torch.testing.assert_close(found.logits, expected.logits, atol=TOLERANCE, rtol=0)


def memory(session: Session) -> list[torch.Tensor]:
    """Everything that a stream remembers, slot order of the carried cache left out."""
    state = session.state
    layers = range(state.spec.layers)
    found = [cache for layer in layers for cache in (state.detailed.keys(layer), state.detailed.values(layer))]
    if state.config.carry != "all":
        found += [_carried_in_order(state, layer) for layer in layers]
        found += [state.carried.kept(layer) for layer in layers]  # type: ignore[union-attr]
    return [tensor.clone() for tensor in found]


def assert_same_stream(found: Session, expected: Session) -> None:
    """Bit for bit the same memories, at the same place."""
    a, b = found.state, expected.state
    assert (a.position, a.frames, a.origin_seconds, a.spans) == (b.position, b.frames, b.origin_seconds, b.spans)
    assert found.frames == expected.frames
    assert_same_memory(memory(found), memory(expected))


def assert_same_memory(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def _carried_in_order(state: StreamState, layer: int) -> torch.Tensor:
    """[2, streams, kv_heads, length, head_dim], sorted by birth."""
    carried: Any = state.carried
    length = carried.lengths[layer]
    order = carried.token_ids[layer][..., :length].argsort(-1)
    held = carried.buffers[layer][..., :length, :]
    found: torch.Tensor = held.gather(-2, order[None, ..., None].expand_as(held))
    return found
