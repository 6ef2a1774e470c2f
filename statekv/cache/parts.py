"""A cache that only grows, in parts that are written once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

# Of one file. A save writes the open part at the end anew, so that is what it may write too much; twice as much would
# halve the number of files.
PART_BYTES = 16 << 20


@dataclass(frozen=True)
class Part:
    """Consecutive tokens of a cache, in every layer.

    Attributes:
        first, stop: which ones.
        tensors: read when they are needed.
    """

    first: int
    stop: int
    tensors: Callable[[], dict[str, torch.Tensor]]


@dataclass
class Written:
    """Which files hold which tokens just as they are now.

    Files are known by what is in them, not by where they lie: so a fork, or two sessions restored from one folder, can
    share them, and whoever writes to another folder writes all of it.
    """

    _found: dict[tuple[int, int], str] = field(default_factory=dict)  # first and stop → SHA-256; in order

    def digest(self, first: int, stop: int) -> str | None:
        """SHA-256 of a file with these tokens; None: nobody knows of any."""
        return self._found.get((first, stop))

    def note(self, found: dict[tuple[int, int], str]) -> None:
        """Know these files, by first token and end, and no others."""
        self._found = dict(sorted(found.items()))

    def forget(self, first: int) -> None:
        """From this token on they do not count any more: keys there have changed, or others will come."""
        while self._found and next(reversed(self._found))[1] > first:
            self._found.popitem()

    def copy(self) -> Written:
        """What a fork knows: its tokens are the same up to here."""
        return Written(dict(self._found))


def tokens_of_part(bytes_per_token: int) -> int:
    """Tokens of a part, but for the last one.

    One size, and no merging of small parts into large ones: no token is written again once its part is whole, no save
    takes longer than the others, and files grow in number with the stream, 64 for a GiB.
    """
    return max(1, -(-PART_BYTES // bytes_per_token))


def ranges(tokens: int, bytes_per_token: int) -> Iterator[tuple[int, int]]:
    """Cut so many tokens into parts of one size, and the rest."""
    size = tokens_of_part(bytes_per_token)
    for first in range(0, tokens, size):
        yield first, min(tokens, first + size)
