"""One wrong input at a time: it is refused in one line, or works; what else comes of it is told."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from statekv.errors import StateKVError

LONGEST_SECONDS, MOST_BYTES = 20.0, 1 << 30
FINE = ("works", "refused")
_UNIT = 1 if sys.platform == "darwin" else 1024  # of what the system counts memory in


class Try(NamedTuple):
    """One wrong input, in words, and what is done with it: a `WrongAnswerError` where what comes out is not right."""

    told: str
    call: Callable[[], object]


class WrongAnswerError(Exception):
    """Something came out without a word that is not what the input says."""


class Hang(BaseException):
    """It takes too long; nothing catches it on the way."""


def outcome(one: Try) -> str:
    """works, refused, or what else came out."""
    before, started = _peak(), time.monotonic()
    try:
        with warnings.catch_warnings(), _impatience():
            warnings.simplefilter("ignore")
            one.call()
        found = "works"
    except StateKVError as error:
        found = "refused" if "\n" not in str(error) else f"several lines: {error}"
    except Hang:
        found = f"hangs for {time.monotonic() - started:.0f} s"
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    more = _peak() - before
    return found if more < MOST_BYTES else f"takes {more / 2**30:.1f} GiB, and {found}"


def ends(some: Iterable[Try]) -> Iterator[tuple[str, str]]:
    """Each input with its outcome."""
    for one in some:
        yield one.told, outcome(one)


def bad_ends(some: Iterable[Try]) -> list[str]:
    """Those that neither work nor are refused."""
    return [f"{told[:200]}: {end}" for told, end in ends(some) if end not in FINE]


def _peak() -> int:
    """Bytes of memory that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT


@contextmanager
def _impatience() -> Iterator[None]:
    def give_up(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, give_up)
    # Of a processor that nobody else wants.
    signal.setitimer(signal.ITIMER_REAL, LONGEST_SECONDS * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
