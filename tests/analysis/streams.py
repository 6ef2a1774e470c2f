"""Streams to look into: a few random frames on tiny models."""

from __future__ import annotations

from typing import Any

from statekv.analysis.holdings import Analysis, watch
from statekv.engine.session import Session
from tests.talk import shared_engine, some_frames


def opened(family: str, frames: int, **settings: Any) -> Session:
    """A session whose source gives random frames."""
    session = shared_engine(family).open(**settings)
    session.source = iter(some_frames(frames))
    return session


def watched(family: str, frames: int, **settings: Any) -> Analysis:
    """All layers of such a stream, looked into."""
    session = opened(family, frames, **settings)
    return watch(session, range(session.state.spec.layers), frames)
