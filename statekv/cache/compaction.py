"""Where steps stand once a stream has been compacted: plain arithmetic on positions."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Compaction:
    """From the position that a step would have without a horizon to the one that it has.

    A step moves as a whole, so that its own tokens keep their distances. Steps before `until` stand `factor` times as
    densely as they came, in order; from `until` on every distance is what it was. Factors are powers of two: a step is
    moved when it leaves the newest ones, and from then on each time that the stream has doubled.

    Attributes:
        first: positions up to here, the prompt's prefix, never move.
        until: uncompacted position of the first step that keeps its distances.
        factor: positions of older steps that share one.
    """

    first: int = 0
    until: int = 0
    factor: int = 1

    def place(self, position: int) -> int:
        """Where a step stands that would begin at `position`."""
        return position - self.gained if position >= self.until else self._squeezed(position)

    @property
    def gained(self) -> int:
        """Positions by which the newest steps have moved towards the front."""
        return self.until - self._squeezed(self.until)

    def next(self, newest: int, first: int, reach: int) -> Compaction:
        """Make room: half of the range becomes free, a quarter holds the newest steps, a quarter all older ones.

        Args:
            newest: uncompacted position of the newest step, which keeps its distances in any case.
            reach: one past the last position that steps may take.
        """
        quarter = max(1, (reach - first) // 4)
        until = max(self.until, first, newest - quarter)
        factor = self.factor
        while (until - first) // factor > quarter:
            factor *= 2
        return Compaction(first, until, factor)

    def _squeezed(self, position: int) -> int:
        return position if position < self.first else self.first + (position - self.first) // self.factor
