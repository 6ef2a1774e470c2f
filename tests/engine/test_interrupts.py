"""Ctrl-C waits for the end of the block, and is not lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import pytest

from statekv.engine.interrupts import deferred_interrupts, endings_interrupt


@pytest.fixture(autouse=True)
def handler() -> Iterator[object]:
    """The handler outside, which must be the same again afterwards."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def deferred(block: Callable[[], None]) -> None:
    with deferred_interrupts():
        block()


def test_an_interrupt_surfaces_after_the_block() -> None:
    done = []

    def block() -> None:
        done.append("before")
        interrupt()
        interrupt()
        done.append("after")

    with pytest.raises(KeyboardInterrupt):
        deferred(block)
    assert done == ["before", "after"]


def test_without_an_interrupt_nothing_happens() -> None:
    with deferred_interrupts():
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler


def test_an_error_passes_through() -> None:
    with pytest.raises(ValueError, match="step"), deferred_interrupts():
        raise ValueError("step")


def test_an_interrupt_wins_over_an_error_and_keeps_it() -> None:
    def block() -> None:
        interrupt()
        raise ValueError("step")

    with pytest.raises(KeyboardInterrupt) as caught:
        deferred(block)
    assert isinstance(caught.value.__context__, ValueError)


def test_blocks_may_be_nested() -> None:
    done = []

    def block() -> None:
        deferred(interrupt)
        done.append("outer")

    with pytest.raises(KeyboardInterrupt):
        deferred(block)
    assert done == ["outer"]


def test_the_next_block_starts_anew() -> None:
    with pytest.raises(KeyboardInterrupt):
        deferred(interrupt)
    deferred(lambda: None)


def test_someone_elses_handler_gets_the_signal() -> None:
    caught: list[int] = []

    def own(signum: int, frame: FrameType | None) -> None:
        caught.append(signum)

    signal.signal(signal.SIGINT, own)
    with deferred_interrupts():
        interrupt()
        assert caught == []
    assert caught == [signal.SIGINT]
    assert signal.signal(signal.SIGINT, signal.default_int_handler) is own


def test_an_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with deferred_interrupts():
        interrupt()
    assert signal.signal(signal.SIGINT, signal.default_int_handler) is signal.SIG_IGN


def test_harmless_off_the_main_thread() -> None:
    seen: list[object] = []

    def work() -> None:
        with deferred_interrupts():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


ENDINGS = [signal.Signals[name] for name in ("SIGHUP", "SIGTERM") if hasattr(signal, name)]


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_ending_is_an_interrupt_that_can_be_deferred(ending: signal.Signals) -> None:
    done = []

    def block() -> None:
        signal.raise_signal(ending)
        done.append("after")

    with pytest.raises(KeyboardInterrupt), endings_interrupt():
        deferred(block)
    assert done == ["after"]
    assert signal.getsignal(ending) is signal.SIG_DFL


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("where", [deferred, lambda block: block()], ids=["in a step", "between steps"])
def test_an_ending_arrives_where_ctrl_c_is_ignored(
    ending: signal.Signals, where: Callable[[Callable[[], None]], None]
) -> None:
    """As in `nohup statekv watch … &` from a script."""

    def block() -> None:
        interrupt()
        where(lambda: signal.raise_signal(ending))

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt), endings_interrupt():
            block()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_ending_that_is_ignored_stays_ignored(ending: signal.Signals) -> None:
    signal.signal(ending, signal.SIG_IGN)
    try:
        with endings_interrupt():
            signal.raise_signal(ending)
        assert signal.getsignal(ending) is signal.SIG_IGN
    finally:
        signal.signal(ending, signal.SIG_DFL)


def test_endings_on_another_thread_are_nobodys_business() -> None:
    found: list[object] = []

    def work() -> None:
        with endings_interrupt():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL]
