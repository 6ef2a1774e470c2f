"""Ctrl-C between steps instead of inside one, so that a stream is always whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def deferred_interrupts(second_gets_through: bool = False) -> Iterator[None]:
    """Hold back KeyboardInterrupt until the block is done.

    Args:
        second_gets_through: for blocks that may hang, such as a read from a network: a second Ctrl-C ends them.
    """
    # None: a handler that Python did not install and could not put back.
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    caught = False

    def remember(signum: int, frame: FrameType | None) -> None:
        nonlocal caught
        if caught and second_gets_through:
            raise KeyboardInterrupt
        caught = True

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if caught:
            signal.raise_signal(signal.SIGINT)
