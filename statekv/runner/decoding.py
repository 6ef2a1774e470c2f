"""How the next token is chosen, and when an answer ends."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from statekv.errors import ConfigError
from statekv.models.adapter import VideoModel
from statekv.models.hooks import logits_processors


@dataclass(frozen=True)
class SamplingParams:
    """How an answer's tokens are chosen, and when it ends, in transformers' own terms.

    Attributes:
        max_new_tokens: longest answer.
        end_tokens: ids that end an answer.
        generation: what stock `generate` would go by, see `generation_settings`; all else is said here.
        seed: of the draws; None uses torch's global generator, as stock does.
        deadline: moment (`time.monotonic`) behind which no further token is chosen.
        stopping: told all tokens behind each one, says whether they are enough; for stop strings.
    """

    max_new_tokens: int
    end_tokens: frozenset[int] = frozenset()
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    seed: int | None = None
    deadline: float = float("inf")
    stopping: StoppingCriteriaList = field(default_factory=StoppingCriteriaList)

    def begin(self, model: GenerationMixin, prompt: torch.Tensor) -> Sampler:
        """Before the first token.

        Args:
            model: whose parameters these are.
            prompt: [streams, T] tokens that penalties look at.

        Raises:
            ConfigError: a parameter outside its range.
        """
        return Sampler(self, logits_processors(model, self.generation, prompt, self.max_new_tokens), prompt)


class Sampler:
    """Chooses the tokens of one answer, one after another, as stock `generate` does.

    Args:
        params: how.
        processors: what they do to the logits.
        prompt: [streams, T].

    Attributes:
        ids: [streams, T] tokens so far.
        ended: whether the newest one was the last.
    """

    def __init__(self, params: SamplingParams, processors: LogitsProcessorList, prompt: torch.Tensor) -> None:
        self.ids, self.ended = prompt, False
        self._params, self._processors = params, processors
        self._draws = None if params.seed is None else torch.Generator().manual_seed(params.seed)

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """The next token [streams] int64, from logits [streams, vocabulary]."""
        scores = self._processors(self.ids, logits.to(torch.float32, copy=True))  # type: ignore[arg-type]
        token = self._draw(scores) if self._params.generation.do_sample else scores.argmax(-1)
        self.ids = torch.cat([self.ids, token[:, None]], dim=1)
        self.ended = self._enough(token)
        return token

    def _draw(self, scores: torch.Tensor) -> torch.Tensor:
        shares = scores.softmax(-1)
        if self._draws is None:
            return shares.multinomial(1)[:, 0]
        # One seed draws the same on every device.
        return shares.cpu().multinomial(1, generator=self._draws)[:, 0].to(shares.device)

    def _enough(self, token: torch.Tensor) -> bool:
        ends, stopping = self._params.end_tokens, self._params.stopping
        if ends and ends.issuperset(token.tolist()):
            return True
        # transformers passes scores along that none of its criteria reads.
        stopped = bool(stopping) and bool(stopping(self.ids, None).all())  # type: ignore[arg-type]
        return stopped or time.monotonic() > self._params.deadline


# Parameters of a GenerationConfig that change an answer and are not followed, with the values that do nothing.
_NOT_FOLLOWED: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "guidance_scale": (None, 1),
    "penalty_alpha": (None, 0),
    "dola_layers": (None,),
    "prompt_lookup_num_tokens": (None,),
    "constraints": (None,),
    "force_words_ids": (None,),
    "token_healing": (None, False),
    "output_scores": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
}


def refuse_unfollowed(settings: GenerationConfig, more: Mapping[str, tuple[Any, ...]] = MappingProxyType({})) -> None:
    """Raise a ConfigError where the settings ask for something that is not done here.

    Args:
        settings: see `generation_settings`.
        more: further parameters that are not followed, with the values that do nothing.
    """
    for name, idle in {**_NOT_FOLLOWED, **more}.items():
        value = getattr(settings, name, None)
        if value not in idle:
            raise ConfigError(f"the generation config sets {name}={value!r}, which is not followed", f"unset {name}")


def sampling_params(model: VideoModel, settings: GenerationConfig, longest: int, seed: int | None) -> SamplingParams:
    """How to choose the tokens of an answer, which begins now.

    Args:
        model: that answers.
        settings: see `generation_settings`.
        longest: answer, in tokens.
        seed: of the draws.

    Raises:
        ConfigError: a value outside its range, or one that is not followed.
    """
    refuse_unfollowed(settings)
    check_number("seed", seed, int)
    check_number("max_time", settings.max_time, float)
    ends = settings.eos_token_id
    if ends is None:
        ends = settings.eos_token_id = sorted(model.end_tokens) or None
    tokens = _ends(ends)
    deadline = float("inf") if settings.max_time is None else time.monotonic() + settings.max_time
    logits_processors(
        model.generator, settings, torch.zeros(1, 1, dtype=torch.int64), longest
    )  # raises what the prompt would
    return SamplingParams(longest, tokens, settings, seed, deadline)


def check_number(name: str, value: Any, kind: type[int] | type[float]) -> None:
    """Raise a ConfigError unless a value is None or a number that 64 bits hold."""
    allowed = (int,) if kind is int else (int, float)
    if value is None or (isinstance(value, allowed) and not isinstance(value, bool) and abs(value) < 2**63):
        return
    told = "a whole number" if kind is int else "a number"
    raise ConfigError(f"{name} is {value!r}, but must be {told}", f"leave {name} out, or give one below 2^63")


def _ends(ends: Any) -> frozenset[int]:
    found = [ends] if isinstance(ends, int) else ends
    if found is not None and not (
        isinstance(found, (list, tuple, set)) and all(isinstance(token, int) for token in found)
    ):
        raise ConfigError(f"eos_token_id is {ends!r}, but must be tokens", "give a whole number, or a list of them")
    return frozenset(found or ())


class Detokenizer:
    """Turns tokens into pieces of text that add up to the decoded whole.

    A piece is held back while it may still change: an unfinished UTF-8 character, or the beginning of a stop string.

    Args:
        tokenizer: decodes.
        stop: strings that end the text; neither they nor what follows are handed out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...] = ()) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(text for text in stop if text)
        self._tokens: list[int] = []
        self._given = 0  # characters

    def push(self, token: int) -> str:
        """The text that this token makes certain."""
        self._tokens.append(token)
        text = self._decode()
        cuts = [text.find(stop) for stop in self._stop if stop in text]
        if cuts:
            self.stopped = True
            return self._give(text, min(cuts))
        return self._give(text, self._certain(text))

    def rest(self) -> str:
        """What was held back, at the end of the answer; nothing after a stop string."""
        if self.stopped:
            return ""
        text = self._decode()
        return self._give(text, len(text))

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))

    def _certain(self, text: str) -> int:
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return self._given
        held = 0
        for stop in self._stop:
            held = max(held, max((n for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0))
        return len(text) - held

    def _give(self, text: str, until: int) -> str:
        piece = text[self._given : until]
        self._given = max(self._given, until)
        return piece
