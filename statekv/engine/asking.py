"""A question to a stream, which is afterwards as it was before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from statekv.cache.stream import StreamState
from statekv.errors import ConfigError
from statekv.models.base import Segment
from statekv.runner.decoding import Sampling
from statekv.runner.stepper import Stepper
from statekv.runner.streaming_text import StreamingText
from statekv.video.frame import Frame


def sampling_of(stepper: Stepper, state: StreamState, max_new_tokens: int | None, **drawing: Any) -> Sampling:
    """How to choose an answer's tokens.

    Raises:
        ConfigError: no room for a token, or drawing that makes no sense.
    """
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}, but must be at least 1", "raise max_new_tokens")
    config = state.config
    longest = max_new_tokens or config.max_new_tokens
    return Sampling(longest, stepper.model.end_tokens, seed=config.seed, **drawing)


def answer(
    stepper: Stepper,
    state: StreamState,
    waiting: Sequence[Frame],
    question: str,
    sampling: Sampling,
    stop: tuple[str, ...],
) -> Iterator[str]:
    """The answer, piece by piece.

    Args:
        stepper: the loaded model.
        state: what is asked about.
        waiting: frames that are part of what was seen, but not of the stream yet.
        question: the text.
        sampling: how to choose tokens.
        stop: the answer ends before any of these strings.
    """
    mark = state.mark()
    try:
        with torch.inference_mode():
            segment = _entering(stepper, state, waiting, question)
        text = StreamingText(stepper.model.tokenizer, stop)
        for token, _ in stepper.answer(state, segment, sampling):
            if token in sampling.end_tokens:
                break
            yield text.push(token)
            if text.stopped:
                break
        yield text.rest()
    finally:
        state.crop_to(mark)


def first_logits(stepper: Stepper, state: StreamState, waiting: Sequence[Frame], question: str) -> torch.Tensor:
    """[streams, vocabulary] float32: what the first token of the answer is chosen from."""
    mark = state.mark()
    try:
        with torch.inference_mode():
            segment = _entering(stepper, state, waiting, question)
            return stepper.logits(stepper.prefill(state, segment, "answer")).float()
    finally:
        state.crop_to(mark)


def _entering(stepper: Stepper, state: StreamState, waiting: Sequence[Frame], question: str) -> Segment:
    """The question's segment, after frames that wait have been shown to it.

    Those do not become part of the stream: they are cropped away with the question.
    """
    model, only_newest = stepper.model, state.config.recall == "last_frames"
    segment = model.question(question, state)
    if not waiting:
        return segment
    steps = [waiting[i : i + model.frames_per_step] for i in range(0, len(waiting), model.frames_per_step)]
    # The newest frames alone are a clip of their own, whose steps follow each other.
    expected = len(waiting) if only_newest else state.frames_expected
    with model.turns:
        looked = model.look(steps, expected)
    for seen in looked:
        for entering in model.enter(seen, state):
            stepper.prefill(state, entering, "carry" if only_newest else "peek")
    return model.question(question, state)
