"""Decoding ahead keeps order, depth and errors, and ends when nobody reads."""

import gc
import itertools
import threading
import weakref

import pytest

from statekv.errors import ConfigError
from statekv.video.prefetch import prefetch

WAIT = 5.0


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "statekv-prefetch"]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    gc.collect()
    assert threads() == []


class Source:
    """Counts up for ever; knows how far it was asked and whether, and where, it was closed."""

    def __init__(self):
        self.produced = 0
        self.reached = {n: threading.Event() for n in range(20)}
        self.closed_on = None

    def __iter__(self):
        return self

    def __next__(self):
        self.produced += 1
        if self.produced in self.reached:
            self.reached[self.produced].set()
        return self.produced

    def close(self):
        self.closed_on = threading.current_thread().name


def test_order_is_kept():
    assert list(prefetch(range(100), 3)) == list(range(100))
    assert list(prefetch([], 1)) == []


@pytest.mark.parametrize("depth", [1, 3])
def test_runs_ahead_by_depth_and_no_more(depth):
    source = Source()
    stream = prefetch(source, depth)
    for taken in range(1, 5):
        assert next(stream) == taken
        assert source.reached[taken + depth].wait(WAIT), "the producer does not run ahead"
        assert not source.reached[taken + depth + 1].wait(0.02), "the producer runs too far ahead"
    stream.close()


def test_an_exception_comes_after_the_items_before_it():
    def source():
        yield 1
        yield 2
        raise LookupError("the third")

    stream = prefetch(source(), 5)
    assert [next(stream), next(stream)] == [1, 2]
    with pytest.raises(LookupError, match="the third"):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)


def test_an_iterable_that_cannot_start_is_reported():
    class Broken:
        def __iter__(self):
            raise OSError("will not start")

    with pytest.raises(OSError, match="will not start"):
        next(prefetch(Broken(), 1))


def test_close_stops_the_thread_and_closes_the_source_there():
    source = Source()
    stream = prefetch(source, 2)
    next(stream)
    stream.close()
    assert source.closed_on == "statekv-prefetch"
    assert threads() == []


def test_dropping_the_generator_stops_the_thread():
    source = Source()
    for _ in prefetch(source, 2):
        break
    gc.collect()
    assert source.closed_on == "statekv-prefetch"
    assert threads() == []


def test_a_generator_that_was_never_started_has_no_thread():
    stream = prefetch(Source(), 2)
    assert threads() == []
    del stream


def test_keyboard_interrupt_in_the_consumer_leaves_nothing():
    source = Source()

    def consume():
        for item in prefetch(source, 2):
            if item == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consume()
    gc.collect()
    assert source.closed_on == "statekv-prefetch"


def test_the_source_is_closed_at_its_end_and_after_an_error():
    closed = []

    def source(fails):
        try:
            yield 1
            if fails:
                raise ValueError
        finally:
            closed.append(fails)

    assert list(prefetch(source(False), 1)) == [1]
    with pytest.raises(ValueError):
        list(prefetch(source(True), 1))
    assert closed == [False, True]


def test_items_handed_on_are_not_kept():
    class Item:
        pass

    alive: weakref.WeakSet[Item] = weakref.WeakSet()
    reached = [threading.Event() for _ in range(52)]

    def source():
        for index in range(50):
            item = Item()
            alive.add(item)
            reached[index].set()
            yield item
            del item
        reached[50].set()
        reached[51].set()

    most, waiting_for = 0, iter(reached[2:])
    for item in prefetch(source(), 2):
        del item
        assert next(waiting_for).wait(WAIT)
        most = max(most, len(alive))
    assert most <= 3, "more than those ahead and the one handed on"


def test_depth_must_be_positive():
    with pytest.raises(ConfigError, match="depth is 0"):
        prefetch(itertools.count(), 0)
