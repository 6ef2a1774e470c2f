"""What a session tells about its work: after each step, and in sum."""

from __future__ import annotations

from dataclasses import dataclass

from statekv.video.source import LiveStatus


@dataclass
class Seconds:
    """Where the time went, in seconds. On a GPU the host runs ahead, so that waiting shows up where it ends."""

    decode: float = 0.0
    vision: float = 0.0
    prefill: float = 0.0
    answer: float = 0.0


@dataclass(frozen=True)
class Progress:
    """Sent after each step.

    Attributes:
        step: number of the step, from 1.
        frames: pictures so far.
        pts_seconds: time of the newest one.
        step_seconds: how long the language model took; in a batch of several sessions' steps, its share.
        carried: tokens that go on to the next step.
        tokens: tokens in the detailed cache.
        live: how the live source is doing; None for other sources.
    """

    step: int
    frames: int
    pts_seconds: float
    step_seconds: float
    carried: int
    tokens: int
    live: LiveStatus | None = None
