"""The demo model, read once: commands and evaluations are given it again and again."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from statekv.engine import engine
from statekv.models.adapter import VideoModel
from statekv.models.loading import load_model
from tests.runner.tower import remember


@functools.cache
def _demo(**arguments: Any) -> VideoModel:
    model = load_model("demo", **arguments)
    remember(model.model.model.vision_tower)
    return model


def _loaded(name: Any, **arguments: Any) -> VideoModel:
    known = name == "demo" and all(isinstance(value, Hashable) for value in arguments.values())
    return _demo(**arguments) if known else load_model(name, **arguments)


@contextmanager
def demo_read_once() -> Iterator[None]:
    """Let every engine have the same demo model, which each leaves as it found it."""
    with mock.patch.object(engine, "load_model", _loaded):
        yield
