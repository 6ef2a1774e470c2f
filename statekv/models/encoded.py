"""The pictures of one step between vision tower and language model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from statekv.errors import ConfigError
from statekv.video.frame import Frame


@dataclass(frozen=True)
class EncodedStep:
    """What the vision tower made of the pictures of one step, not yet part of any stream.

    Attributes:
        frames: 1 … frames_per_step pictures; none where only a processor's pixels are known.
        features: [n, hidden], one for each token that goes on.
        grid: rows and columns of tokens of the whole picture; one row where they make no grid.
        deepstack: features [n, hidden] for the first layers of families that have them.
        kept: [n] int64 on the CPU, ascending: which of the whole picture's rows · columns tokens, counted row by row,
            the features are; None: all of them. A token that is left out leaves its position empty.
    """

    frames: tuple[Frame, ...]
    features: torch.Tensor
    grid: tuple[int, int]
    deepstack: tuple[torch.Tensor, ...] = ()
    kept: torch.Tensor | None = None

    @property
    def total(self) -> int:
        """Tokens of the whole picture."""
        return self.grid[0] * self.grid[1]

    @property
    def places(self) -> torch.Tensor:
        """`kept`, also where it is all of them."""
        return torch.arange(self.total) if self.kept is None else self.kept

    @property
    def pts_seconds(self) -> float | None:
        """Time of the first picture, where that is known."""
        return self.frames[0].pts_seconds if self.frames else None

    def keep(self, tokens: torch.Tensor) -> EncodedStep:
        """The same step with only some of its tokens.

        Args:
            tokens: which of the features: bool [n], or their numbers, int64 and ascending. On a GPU the host waits for
                it here, for the language model's work depends on how many they are.

        Raises:
            ConfigError: something else, or a number that none of them has.
        """
        n = len(self.features)
        if not isinstance(tokens, torch.Tensor) or tokens.dtype not in (torch.bool, torch.int64) or tokens.ndim != 1:
            kind = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, torch.Tensor) else type(tokens).__name__
            raise ConfigError(f"step.keep was given {kind}", f"give bool [{n}], or numbers in int64 [n]")
        if tokens.dtype == torch.bool and len(tokens) != n:
            raise ConfigError(f"step.keep was given a mask of {len(tokens)} for {n} tokens", f"give bool [{n}]")
        if tokens.dtype == torch.int64 and len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < n:
            rule = f"step.keep was given numbers from {int(tokens.min())} to {int(tokens.max())} for {n} tokens"
            raise ConfigError(rule, f"give numbers from 0 to {n - 1}")
        chosen = (tokens.nonzero()[:, 0] if tokens.dtype == torch.bool else tokens).cpu()
        if len(chosen) == len(self.features):
            return self
        here = chosen.to(self.features.device)
        return replace(
            self,
            features=self.features[here],
            deepstack=tuple(layer[here] for layer in self.deepstack),
            kept=self.places[chosen],
        )


Reduce = Callable[[EncodedStep], EncodedStep]


def unchanged(step: EncodedStep) -> EncodedStep:
    """What becomes of a step where nothing reduces it."""
    return step
