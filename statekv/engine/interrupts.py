"""Ctrl-C, and what else ends a process, between steps instead of inside one, so that a stream is always whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_NAMES = ("SIGINT", "SIGHUP", "SIGTERM")  # Windows has no SIGHUP
_ENDINGS = [signal.Signals[name] for name in _NAMES if name in signal.Signals.__members__]


@contextmanager
def deferred_interrupts(second_gets_through: bool = False) -> Iterator[None]:
    """Hold back what handlers of SIGINT, SIGHUP and SIGTERM do, KeyboardInterrupt for one, until the block is done.

    A signal without a handler does at once what the system makes of it: nothing where it is ignored.

    Args:
        second_gets_through: for blocks that may hang, such as a read from a network: a second Ctrl-C ends them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Not callable: ignored, the system's own, or one that Python did not install and could not put back.
    before = {number: found for number in _ENDINGS if callable(found := signal.getsignal(number))}
    caught: list[int] = []

    def remember(signum: int, frame: FrameType | None) -> None:
        if caught and second_gets_through:
            raise KeyboardInterrupt
        caught.append(signum)

    for number in before:
        signal.signal(number, remember)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if caught:
            signal.raise_signal(caught[0])


@contextmanager
def endings_interrupt() -> Iterator[None]:
    """Let the end of the terminal (SIGHUP) and the wish that the process ends (SIGTERM) be what Ctrl-C is.

    What is ignored stays ignored: SIGHUP under nohup, SIGINT in what a script has started with `&`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    changed = [number for number in _ENDINGS if signal.getsignal(number) is signal.SIG_DFL]
    for number in changed:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)
