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


@contextmanager
def endings_interrupt() -> Iterator[None]:
    """Let the end of the terminal (SIGHUP) and the wish that the process ends (SIGTERM) be what Ctrl-C is.

    What is ignored, as under nohup, stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = [name for name in ("SIGHUP", "SIGTERM") if hasattr(signal, name)]  # Windows has no SIGHUP
    changed = [number for name in names if signal.getsignal(number := getattr(signal, name)) is signal.SIG_DFL]
    for number in changed:
        signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)
