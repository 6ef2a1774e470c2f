"""Runs any iterator ahead of its consumer, on a thread."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable, Iterator
from queue import SimpleQueue
from typing import Generic, TypeVar

from statekv.errors import ConfigError

T = TypeVar("T")

# A source stuck in a network read cannot be interrupted; its thread is a daemon and ends when the read does.
_JOIN_SECONDS = 1.0


def prefetch(iterable: Iterable[T], depth: int) -> Generator[T, None, None]:
    """Yield the items of `iterable`, up to `depth` of them (a ConfigError below 1) produced ahead on a daemon thread.

    The thread starts with the first item asked for. An exception of the source reaches the consumer after the items
    before it. Closing or dropping the returned generator stops the thread and closes the source.
    """
    if depth < 1:
        raise ConfigError(f"prefetch depth is {depth}, must be at least 1", "or use the iterable itself")
    return _consume(iterable, depth)


class _End:
    """The last thing a producer sends: the source is finished, or failed with `error`."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class _Producer(Generic[T]):
    # SimpleQueue alone may be used from a finalizer, which can run on either thread at any instruction.
    def __init__(self, iterable: Iterable[T], depth: int) -> None:
        self.items: SimpleQueue[T | _End] = SimpleQueue()
        self.tickets: SimpleQueue[None] = SimpleQueue()
        self.stopped = False
        for _ in range(depth):
            self.tickets.put(None)
        self.thread = threading.Thread(target=self._run, args=(iterable,), name="statekv-prefetch", daemon=True)
        self.thread.start()

    def _run(self, iterable: Iterable[T]) -> None:
        error: BaseException | None = None
        try:
            self._produce(iter(iterable))
        except BaseException as caught:
            error = caught
        self.items.put(_End(error))

    def _produce(self, source: Iterator[T]) -> None:
        try:
            while True:
                self.tickets.get()
                if self.stopped:
                    return
                try:
                    item = next(source)
                except StopIteration:
                    return
                self.items.put(item)
                del item
        finally:
            close = getattr(source, "close", None)
            if close is not None:
                close()

    def stop(self) -> None:
        self.stopped = True
        self.tickets.put(None)
        # The cycle collector may run this on the producer's own thread, which cannot wait for itself.
        if self.thread is not threading.current_thread():
            self.thread.join(_JOIN_SECONDS)


def _consume(iterable: Iterable[T], depth: int) -> Generator[T, None, None]:
    producer = _Producer(iterable, depth)
    del iterable
    try:
        while not isinstance(item := producer.items.get(), _End):
            producer.tickets.put(None)
            yield item
        if item.error is not None:
            raise item.error
    finally:
        producer.stop()
