"""StateKV: a frozen video language model as a stream that you can question at any moment."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from statekv.errors import explained

if TYPE_CHECKING:
    from statekv.config import Config
    from statekv.dropin import generate
    from statekv.engine import Engine, load
    from statekv.errors import StateKVError
    from statekv.session import Session
    from statekv.video.frame import Frame

__version__ = version("statekv")

# Looked up at first use: importing statekv imports neither torch nor transformers.
_HOMES = {
    "Config": "statekv.config",
    "Engine": "statekv.engine",
    "Frame": "statekv.video.frame",
    "Session": "statekv.session",
    "StateKVError": "statekv.errors",
    "generate": "statekv.dropin",
    "load": "statekv.engine",
}

__all__ = ["Config", "Engine", "Frame", "Session", "StateKVError", "__version__", "generate", "load"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'statekv' has no attribute {name!r}")
    try:
        return getattr(import_module(_HOMES[name]), name)
    except (ImportError, RuntimeError) as error:
        raise explained(error) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
