"""A lock that is handed on in order."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from statekv.runner.lock import FairLock


def start(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def until(true: Callable[[], bool]) -> None:
    while not true():
        time.sleep(0.001)


def test_whoever_waits_longest_is_next() -> None:
    lock, order, threads = FairLock(), [], []
    lock.acquire()
    for number in range(8):

        def work(number: int = number) -> None:
            with lock:
                order.append(number)

        threads.append(start(work))
        until(lambda number=number: len(lock._waiting) == number + 1)  # type: ignore[misc]
    lock.release()
    for thread in threads:
        thread.join()
    assert order == list(range(8))


def test_nobody_overtakes_by_asking_again_at_once() -> None:
    lock, seen = FairLock(), []
    with lock:
        other = start(lambda: seen.append("other") if lock.acquire() else None)
        until(lambda: len(lock._waiting) == 1)
    assert not lock.acquire(wait=False)  # handed over, not just left
    other.join()
    assert seen == ["other"]


def test_the_holder_may_take_it_again_and_others_only_when_all_is_given_back() -> None:
    lock, free = FairLock(), []
    with lock, lock:
        start(lambda: free.append(lock.acquire(wait=False))).join()
        with lock:
            pass
    start(lambda: free.append(lock.acquire(wait=False))).join()
    assert free == [False, True]


def test_it_keeps_threads_apart() -> None:
    lock, counted = FairLock(), [0]

    def work() -> None:
        for _ in range(200):
            with lock:
                before = counted[0]
                time.sleep(0)
                counted[0] = before + 1

    for thread in [start(work) for _ in range(6)]:
        thread.join()
    assert counted == [1200]


def test_an_error_inside_gives_it_back() -> None:
    lock = FairLock()
    with pytest.raises(ZeroDivisionError), lock:
        raise ZeroDivisionError
    assert lock.acquire(wait=False)


def test_only_the_holder_gives_it_back() -> None:
    lock = FairLock()
    lock.acquire()
    caught: list[bool] = []

    def work() -> None:
        try:
            lock.release()
        except AssertionError:
            caught.append(True)

    start(work).join()
    assert caught == [True]
