"""Which bytes of a file are free: taken in any size, given back in any order."""

from __future__ import annotations

from collections.abc import Iterable

Span = tuple[int, int]  # first byte, and one past the last


class Vacancies:
    """Free spans of a file that is never longer than the most bytes that were ever taken at once.

    What is given back is used before the file grows, if need be in several spans. Most pieces of one file have one
    size, so that one that goes leaves just the room that the next one needs.
    """

    def __init__(self) -> None:
        self.end = 0  # bytes of the file
        self._stops: dict[int, int] = {}  # of free spans, by their starts; no two of them touch
        self._starts: dict[int, int] = {}
        self._by_size: dict[int, dict[int, None]] = {}  # starts of the free spans of each size, the oldest first

    def take(self, size: int) -> list[Span]:
        """So many bytes: the smallest free span that has them, or the largest ones, or what lies behind the end."""
        found: list[Span] = []
        while size:
            enough = min((each for each in self._by_size if each >= size), default=None)
            if enough is not None:
                found.append(self._cut(enough, size))
            elif self._by_size:
                largest = max(self._by_size)
                found.append(self._cut(largest, largest))
            else:
                found.append((self.end, self.end + size))
                self.end += size
            size -= found[-1][1] - found[-1][0]
        return found

    def give(self, spans: Iterable[Span]) -> None:
        """Take spans back."""
        for start, stop in spans:
            if stop in self._stops:
                stop = self._remove(stop)[1]
            if start in self._starts:
                start = self._remove(self._starts[start])[0]
            if stop == self.end:
                self.end = start
            else:
                self._add(start, stop)

    def _cut(self, length: int, size: int) -> Span:
        """The first bytes of a free span of a length."""
        start, stop = self._remove(next(iter(self._by_size[length])))
        if size < length:
            self._add(start + size, stop)
        return start, start + size

    def _add(self, start: int, stop: int) -> None:
        self._stops[start], self._starts[stop] = stop, start
        self._by_size.setdefault(stop - start, {})[start] = None

    def _remove(self, start: int) -> Span:
        stop = self._stops.pop(start)
        del self._starts[stop]
        same = self._by_size[stop - start]
        del same[start]
        if not same:
            del self._by_size[stop - start]
        return start, stop
