"""How the next token is chosen, and when an answer ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from statekv.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
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
