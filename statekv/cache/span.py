"""What a stream knows of its segments and moments besides their keys."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """Where a segment lies in the detailed cache, and when it was: `pts_seconds` is None for text alone.

    `position` is where it would begin on the axis of time if nothing had ever been compacted.
    """

    kind: str
    start: int
    length: int
    pts_seconds: float | None
    position: int


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment of a stream that `StreamState.crop_to` can return to."""

    tokens: int
    position: int
    carried: int
    frames: int
    origin_seconds: float | None
