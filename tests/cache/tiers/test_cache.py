"""A session that is closed leaves nothing behind."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from statekv.engine.engine import Engine
from statekv.video.writer import write_video
from tests.engine.test_scheduler import watching
from tests.engine.test_session_failures import failing
from tests.talk import QUESTION, shared_engine, some_frames
from tests.tiny import TWO_FAMILIES, video

CYCLES = 20  # every two of the things that happen each second to fifth time come together


def held() -> tuple[int, int, int]:
    """Bytes of all live tensors, storages counted once; threads; open files."""
    gc.collect()
    storages = {
        found.untyped_storage().data_ptr(): found.untyped_storage().nbytes()
        for found in gc.get_objects()
        if issubclass(type(found), torch.Tensor)
    }
    return sum(storages.values()), threading.active_count(), len(os.listdir("/proc/self/fd"))


def cycle(engine: Engine, clip: Path, number: int) -> None:
    """Open, step, ask, close; every fifth time something goes wrong on the way."""
    settings: dict[str, Any] = {"budget": 20, **({"method": "statekv_retrieve"} if number % 3 else {})}
    session = engine.open(clip, **settings) if number % 4 == 0 else watching(engine, some_frames(6), **settings)
    together = [session, *(watching(engine, some_frames(6, seed), **settings) for seed in (1, 2))]
    if number % 5 == 0:
        with failing(engine.model.language_model.layers[1].mlp, ZeroDivisionError):
            engine.watch_all(together)
    else:
        assert engine.watch_all(together) == {}
        assert session.ask(QUESTION, max_new_tokens=2)
        together.append(session.fork())
        if number % 2:
            next(session.stream(QUESTION))  # and nobody reads on
    for each in together:
        each.close()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are counted on Linux")
@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_many_sessions_later_all_is_as_before(family: str, tmp_path: Path) -> None:
    engine = shared_engine(family)
    write_video(tmp_path / "clip.mp4", video(6), fps=1)
    for number in range(10):  # tables that a model makes once
        cycle(engine, tmp_path / "clip.mp4", number)
    before = held()
    for number in range(CYCLES):
        cycle(engine, tmp_path / "clip.mp4", number)
    assert held() == before


def test_bytes_are_seen_to_be_held_while_a_session_is_open() -> None:
    """The measure above measures."""
    engine = shared_engine("internvl")
    before = held()[0]
    session = engine.open(budget=20)
    session.push(some_frames(6))
    during = held()[0] - before
    assert during >= sum(session.state.nbytes.values()) > 0
    session.close()
    assert sum(session.state.nbytes.values()) == 0
    del session
    assert held()[0] == before
