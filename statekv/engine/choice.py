"""Which frames of a video a stream sees: the only place that knows which settings say so."""

from __future__ import annotations

from statekv.config import GATES, Config
from statekv.config.spelling import load_named
from statekv.video.sampling import FrameGate, FrameSampler


def sampler_of(config: Config) -> FrameSampler:
    """Which frames are seen, by their times."""
    newest = config.last_frames if config.recall == "last_frames" else None
    return FrameSampler(None if config.uniform else config.fps, config.max_frames, config.uniform, newest)


def gate_of(config: Config) -> FrameGate | None:
    """What looks at each of them before the vision tower does.

    Raises:
        ConfigError: there is no such gate, or it does not take such parameters.
    """
    found: FrameGate | None = None if config.gate is None else load_named(config.gate, GATES, "`gate`", FrameGate)
    return found


def with_gate(config: Config) -> Config:
    """The same settings with the gate itself in place of its spelling; errors as of `gate_of`."""
    return config.with_(gate=gate_of(config)) if isinstance(config.gate, str) else config
