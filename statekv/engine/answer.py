"""A question, and its answer piece by piece."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

import torch

from statekv.cache.spec import Mark
from statekv.cache.stream import StreamState
from statekv.engine.choice import sampler_of
from statekv.engine.ingest import full_steps
from statekv.errors import ConfigError
from statekv.models.adapter import Segment
from statekv.models.encoded import EncodedStep
from statekv.models.hooks import DRAWING, generation_settings
from statekv.runner.decoding import Detokenizer, SamplingParams, refuse_unfollowed, sampling_params
from statekv.runner.runner import ModelRunner
from statekv.video.frame import Frame

# An endless stream keeps the words that have entered, and not their order or number.
_OF_A_WHOLE_PROMPT = {"no_repeat_ngram_size": (None, 0), "encoder_no_repeat_ngram_size": (None, 0)}


def answering(
    runner: ModelRunner,
    state: StreamState,
    max_new_tokens: int | None,
    stop: str | Sequence[str],
    seed: int | None,
    generation: Mapping[str, Any],
) -> tuple[SamplingParams, tuple[str, ...]]:
    """How to choose an answer's tokens, and the strings that end it.

    Lengths that count the prompt (max_length, min_length) mean nothing in a stream without end, and are left out.

    Raises:
        ConfigError: no room for a token, a parameter that cannot be followed, or one that means nothing.
    """
    model, longest = runner.model.generator, state.config.max_new_tokens if max_new_tokens is None else max_new_tokens
    if isinstance(longest, bool) or not isinstance(longest, int) or not 1 <= longest < 2**31:
        rule = f"max_new_tokens is {longest!r}, but must be a whole number of at least 1 and below 2^31"
        raise ConfigError(rule, "give such a number, or leave it out")
    if not isinstance(generation.get("do_sample"), (bool, NoneType)):
        raise ConfigError(f"do_sample is {generation['do_sample']!r}, but must be True or False", "or leave it out")
    for name in ("max_length", "min_length"):
        if generation.get(name) is not None:
            told = name.replace("length", "new_tokens")
            raise ConfigError(f"{name} is {generation[name]!r}, but counts a prompt that has no end", f"give {told}")
    settings = generation_settings(model, {**generation, "max_length": None, "min_length": None})
    refuse_unfollowed(settings, _OF_A_WHOLE_PROMPT)
    for name in () if settings.do_sample else DRAWING:
        if generation.get(name) is not None:
            rule = f"{name} is {generation[name]!r}, but means something only where tokens are drawn"
            raise ConfigError(rule, f"pass do_sample=True, or leave {name} out")
    found = sampling_params(runner.model, settings, longest, seed)
    strings = () if settings.stop_strings is None else _strings(settings.stop_strings)
    return found, (*_strings(stop), *strings)


def _strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    found = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, Iterable) else (stop,)
    if not all(isinstance(text, str) for text in found):
        raise ConfigError(f"stop is {stop!r}, but must be strings", "give a string, or several in a tuple")
    return found


@dataclass
class Answer:
    """An answer that has begun: the question has been read, and nothing has been said yet.

    Attributes:
        runner: the loaded model.
        state: what it goes on with, apart from the stream; the stream itself where it is `held`.
        logits: [streams, vocabulary], what the first token is chosen from.
        prompt: [streams, T] tokens that penalties look at.
        sampling: how to choose tokens.
        stop: the answer ends before any of these strings.
        mark: where a stream that is held goes back to; None: it is there already.
    """

    runner: ModelRunner
    state: StreamState
    logits: torch.Tensor
    prompt: torch.Tensor
    sampling: SamplingParams
    stop: Sequence[str]
    mark: Mark | None

    @property
    def held(self) -> bool:
        """Whether the stream may not change before the answer is closed."""
        return self.mark is not None

    def pieces(self) -> Iterator[str]:
        """The answer, piece by piece."""
        text = Detokenizer(self.runner.model.tokenizer, tuple(self.stop))
        for token, _ in self.runner.decode(self.state, self.logits, self.sampling, self.prompt):
            if token in self.sampling.end_tokens:
                break
            yield text.push(token)
            if text.stopped:
                break
        yield text.rest()

    def close(self) -> None:
        """Let go of the stream, where it is held."""
        if self.mark is not None:
            self.state.crop_to(self.mark)


def begin_answer(
    runner: ModelRunner,
    state: StreamState,
    waiting: Sequence[Frame],
    question: str,
    sampling: SamplingParams,
    stop: Sequence[str] = (),
) -> Answer:
    """Have a question read; the stream is as before, unless it is held: then it is once the answer is closed.

    Args:
        runner: the loaded model.
        state: what is asked about.
        waiting: frames that are part of what was seen, but not of the stream yet.
        question: the text.
        sampling: how to choose tokens.
        stop: the answer ends before any of these strings.
    """
    mark = state.mark()
    try:
        with torch.inference_mode():
            segment = _entering(runner, state, waiting, question)
        # What stock `generate` would call the prompt, but for the order and number of its words.
        known = sorted(state.words) if runner.model.generates_prompt else []
        words = torch.tensor([known], dtype=segment.ids.dtype, device=segment.ids.device)
        asked = segment.ids if runner.model.generates_prompt else segment.ids[:, :0]
        logits = runner.ask(state, segment, sampling.max_new_tokens)
        apart = state.apart(mark)
    except BaseException:
        state.crop_to(mark)
        raise
    held = apart is state
    if not held:
        state.crop_to(mark)
    return Answer(runner, apart, logits, torch.cat([words, asked], dim=1), sampling, stop, mark if held else None)


def first_logits(runner: ModelRunner, state: StreamState, waiting: Sequence[Frame], question: str) -> torch.Tensor:
    """[streams, vocabulary] float32: what the first token of the answer is chosen from."""
    mark = state.mark()
    try:
        with torch.inference_mode():
            segment = _entering(runner, state, waiting, question)
            return runner.ask(state, segment).float()
    finally:
        state.crop_to(mark)


def _entering(runner: ModelRunner, state: StreamState, waiting: Sequence[Frame], question: str) -> Segment:
    """The question's segment, after frames that wait have been shown to it.

    Those do not become part of the stream: they are cropped away with the question.
    """
    model, alone = runner.model, sampler_of(state.config).newest is not None
    segment = model.question(question, state)
    for seen in waiting_steps(runner, state, waiting):
        for entering in runner.segments_of(state, seen, compact=False):
            runner.enter(state, entering, "carry" if alone else "peek")
    return model.question(question, state) if waiting else segment


def waiting_steps(runner: ModelRunner, state: StreamState, waiting: Sequence[Frame]) -> list[EncodedStep]:
    """What the vision tower makes of frames that wait, step by step.

    The newest frames alone are a clip of their own, whose steps follow each other.
    """
    if not waiting:
        return []
    steps = full_steps(waiting, runner.model.frames_per_step)
    if rest := list(waiting[sum(map(len, steps)) :]):
        steps.append(rest)
    alone = sampler_of(state.config).newest is not None
    return runner.encode(steps, len(waiting) if alone else state.frames_expected)
