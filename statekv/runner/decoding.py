"""How the next token is chosen, and when an answer ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from statekv.errors import ConfigError


@dataclass(frozen=True)
class SamplingParams:
    """Greedy by default; with `do_sample` as transformers' generation parameters of the same names.

    Attributes:
        max_new_tokens: longest answer.
        end_tokens: ids that end an answer.
        do_sample: draw instead of taking the most likely token.
        temperature, top_k, top_p: shape of the distribution drawn from; None leaves it alone.
        repetition_penalty: above 1 makes tokens of the question and the answer less likely.
        seed: of the draws; None uses torch's global generator.
    """

    max_new_tokens: int
    end_tokens: frozenset[int] = frozenset()
    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    _processors: LogitsProcessorList = field(init=False, repr=False, compare=False)
    _generator: torch.Generator | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_processors", self._build())
        generator = torch.Generator().manual_seed(self.seed) if self.seed is not None else None
        object.__setattr__(self, "_generator", generator)

    def choose(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The next token.

        Args:
            ids: [streams, T] tokens so far.
            logits: [streams, vocabulary].

        Returns:
            [streams] int64.
        """
        scores: torch.Tensor = self._processors(ids, logits.float())  # type: ignore[arg-type]
        if not self.do_sample:
            return scores.argmax(-1)
        drawn = torch.multinomial(scores.softmax(-1).cpu(), 1, generator=self._generator)
        return drawn[:, 0].to(ids.device)

    def _build(self) -> LogitsProcessorList:
        made: list[Any] = []
        try:
            if self.repetition_penalty is not None and self.repetition_penalty != 1:
                made.append(RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty)))
            if self.do_sample and self.temperature is not None and self.temperature != 1:
                made.append(TemperatureLogitsWarper(float(self.temperature)))
            if self.do_sample and self.top_k:
                made.append(TopKLogitsWarper(self.top_k))
            if self.do_sample and self.top_p is not None and self.top_p != 1:
                made.append(TopPLogitsWarper(float(self.top_p)))
        except ValueError as error:
            raise ConfigError(str(error).splitlines()[0], "leave the parameter out to go without it") from None
        return LogitsProcessorList(made)


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
