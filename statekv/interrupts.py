"""Ctrl-C between steps instead of inside one, so that a stream is always whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Hold back KeyboardInterrupt until the block is done; only the main thread ever gets one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught = False

    def remember(signum: int, frame: FrameType | None) -> None:
        nonlocal caught
        caught = True

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if caught:
            signal.raise_signal(signal.SIGINT)
