"""A lock that is handed on in order."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from statekv.runner.lock import Turns


def start(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def until(true: Callable[[], bool]) -> None:
    while not true():
        time.sleep(0.001)


def test_whoever_waits_longest_is_next() -> None:
    turns, order, threads = Turns(), [], []
    turns.take()
    for number in range(8):

        def work(number: int = number) -> None:
            with turns:
                order.append(number)

        threads.append(start(work))
        until(lambda number=number: len(turns._waiting) == number + 1)  # type: ignore[misc]
    turns.leave()
    for thread in threads:
        thread.join()
    assert order == list(range(8))


def test_nobody_overtakes_by_asking_again_at_once() -> None:
    turns, seen = Turns(), []
    with turns:
        other = start(lambda: seen.append("other") if turns.take() else None)
        until(lambda: len(turns._waiting) == 1)
    assert not turns.take(wait=False)  # handed over, not just left
    other.join()
    assert seen == ["other"]


def test_the_holder_may_take_it_again_and_others_only_when_all_is_given_back() -> None:
    turns, free = Turns(), []
    with turns, turns:
        start(lambda: free.append(turns.take(wait=False))).join()
        with turns:
            pass
    start(lambda: free.append(turns.take(wait=False))).join()
    assert free == [False, True]


def test_it_keeps_threads_apart() -> None:
    turns, counted = Turns(), [0]

    def work() -> None:
        for _ in range(200):
            with turns:
                before = counted[0]
                time.sleep(0)
                counted[0] = before + 1

    for thread in [start(work) for _ in range(6)]:
        thread.join()
    assert counted == [1200]


def test_an_error_inside_gives_it_back() -> None:
    turns = Turns()
    with pytest.raises(ZeroDivisionError), turns:
        raise ZeroDivisionError
    assert turns.take(wait=False)


def test_only_the_holder_gives_it_back() -> None:
    turns = Turns()
    turns.take()
    caught: list[bool] = []

    def work() -> None:
        try:
            turns.leave()
        except AssertionError:
            caught.append(True)

    start(work).join()
    assert caught == [True]
