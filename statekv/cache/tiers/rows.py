"""Where the steps of a block lie in its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

GROUP = 32  # tokens that share a scale and a zero

Content = dict[str, torch.Tensor]  # of one layer: "tokens", or "codes", "scale" and "zero" (`cache.sealed`)


@dataclass(frozen=True, slots=True)
class Rows:
    """Where one step lies in a block: its tokens, and its groups where they are quantised.

    Attributes:
        number: which of the block's steps it is.
        first: its first token.
        tokens: how many.
        first_group: its first group.
    """

    number: int
    first: int
    tokens: int
    first_group: int

    @property
    def last(self) -> int:
        """One past its last token."""
        return self.first + self.tokens

    @property
    def last_group(self) -> int:
        """One past its last group."""
        return self.first_group + -(-self.tokens // GROUP)

    def of(self, content: Content) -> Content:
        """Views of this step's part of one layer's tensors."""
        return {
            name: tensor[self.first : self.last]
            if name in ("tokens", "codes")
            else tensor[self.first_group : self.last_group]
            for name, tensor in content.items()
        }


def rows_of(lengths: Sequence[int]) -> list[Rows]:
    """Where steps of these lengths lie in their block."""
    found, first, group = [], 0, 0
    for number, length in enumerate(lengths):
        found.append(Rows(number, first, length, group))
        first, group = found[-1].last, found[-1].last_group
    return found


def only(content: Sequence[Content], rows: Sequence[Rows], kept: Sequence[int]) -> list[Content]:
    """A block's content with some of its steps alone; these are as they were, to the bit."""
    return [joined([rows[number].of(layer) for number in kept]) for layer in content]


def joined(parts: Sequence[Content]) -> Content:
    """Parts of one layer's tensors, one behind another, copied."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
