"""Where the tokens of one segment are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from statekv.cache.tiers.sealed import Sealed


@dataclass(eq=False, slots=True)
class Passage:
    """One segment in a detailed cache with a cap.

    Attributes:
        start: number of its first token in the stream.
        length: tokens.
        kind: a "step" may leave the buffers and may be forgotten; all else stays.
        place: its first token's place in the buffers, while it is there.
        worth: the most that its carried keys have scored when steps were made room for.
        block: what it lies in, once it has left the buffers.
        row: which of the block's steps it is.
        moved: positions that it has moved by since it was sealed.
    """

    start: int
    length: int
    kind: str
    place: int
    worth: float = 0.0
    block: Sealed | None = None
    row: int = 0
    moved: int = 0

    @property
    def sealed(self) -> Sealed:
        """The block of a step that has left the buffers."""
        assert self.block is not None
        return self.block

    @property
    def rank(self) -> tuple[float, int]:
        """Steps with the lowest rank are forgotten first: those that score least, of these the oldest."""
        return self.worth, self.start


def first_of(passages: Iterable[Passage], tokens: int) -> list[Passage]:
    """As many of the first ones as have so many tokens in all."""
    found, taken = [], 0
    for passage in passages:
        if taken >= tokens:
            break
        found.append(passage)
        taken += passage.length
    return found


def groups_of(passages: Sequence[Passage], tokens: int) -> Iterator[list[Passage]]:
    """All of them, in groups that have so many tokens or lie before something else in the buffers."""
    while passages:
        group = first_of(_side_by_side(passages), tokens)
        yield group
        passages = passages[len(group) :]


def _side_by_side(passages: Sequence[Passage]) -> Iterator[Passage]:
    yield passages[0]
    for before, passage in pairwise(passages):
        if passage.place != before.place + before.length:
            return
        yield passage
