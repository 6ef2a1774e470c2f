"""StateKV: a frozen video language model as a stream that you can question at any moment."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from statekv.errors import explained

if TYPE_CHECKING:
    from statekv.config import Config
    from statekv.engine.engine import Engine, load
    from statekv.engine.generate import generate
    from statekv.engine.session import Session
    from statekv.errors import StateKVError
    from statekv.video.frame import Frame

    __version__: str

logging.getLogger("statekv").addHandler(logging.NullHandler())  # heard once the application listens

# Looked up at first use: importing statekv imports neither torch nor transformers.
_HOMES = {
    "Config": "statekv.config",
    "Engine": "statekv.engine.engine",
    "Frame": "statekv.video.frame",
    "Session": "statekv.engine.session",
    "StateKVError": "statekv.errors",
    "generate": "statekv.engine.generate",
    "load": "statekv.engine.engine",
}

__all__ = ["Config", "Engine", "Frame", "Session", "StateKVError", "__version__", "generate", "load"]


def __getattr__(name: str) -> Any:
    if name == "__version__":  # reading it takes longer than everything else here
        return import_module("importlib.metadata").version("statekv")
    if name not in _HOMES:
        raise AttributeError(f"module 'statekv' has no attribute {name!r}")
    try:
        return getattr(import_module(_HOMES[name]), name)
    except (ImportError, RuntimeError) as error:
        raise explained(error) from error


def __dir__() -> list[str]:
    return sorted(__all__)
