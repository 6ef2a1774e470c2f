"""A session in a program that runs an event loop: the same methods, awaited, their work on a thread beside it."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import aclosing, contextmanager, suppress
from threading import Event
from typing import TYPE_CHECKING, Any, TypeVar

from statekv.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from statekv.engine.progress import Progress

T = TypeVar("T")


class Awaitable(ABC):
    """Twins of the methods that take their time. Cancelling one ends its work before the cancellation goes on.

    Tasks take turns as threads do. One in the middle of an answer would wait for itself, and gets a ConfigError.
    """

    _reader: asyncio.Task[Any] | None = None  # who is in the middle of an answer

    @abstractmethod
    def stream(self, question: str, **how: Any) -> Generator[str, None, None]:
        """An answer piece by piece."""

    @abstractmethod
    def watch(
        self,
        until_seconds: float | None = None,
        on_step: Callable[[Progress], None] | None = None,
        pause: Callable[[], bool] | None = None,
    ) -> None:
        """Prefill the source's frames."""

    async def aask(self, question: str, **how: Any) -> str:
        """As `ask`, which says what may be given; cancelled, the answer ends with the token that is being made."""
        async with aclosing(self.astream(question, **how)) as pieces:
            return "".join([piece async for piece in pieces])

    async def astream(self, question: str, **how: Any) -> AsyncGenerator[str, None]:
        """As `stream`. Leave it by `aclosing`, or to its end: nothing may enter before it is done."""
        self._check_task()
        pieces = self.stream(question, **how)
        with _own_thread() as thread:
            try:
                while (piece := await _finished(thread, next, pieces, None)) is not None:
                    self._reader = asyncio.current_task()
                    yield piece
            finally:
                self._reader = None
                await _finished(thread, pieces.close)

    async def awatch(
        self,
        until_seconds: float | None = None,
        on_step: Callable[[Progress], None] | None = None,
        pause: Callable[[], bool] | None = None,
    ) -> None:
        """As `watch`; cancelled, it stops behind the step that is being taken, and may be called again.

        `on_step` and `pause` are called on the thread that does the work.
        """
        self._check_task()
        cancelled = Event()

        def stop() -> bool:
            return cancelled.is_set() or (pause is not None and pause())

        with _own_thread() as thread:
            await _finished(thread, self.watch, until_seconds, on_step, stop, on_cancel=cancelled.set)

    def _check_task(self) -> None:
        if self._reader is not None and self._reader is asyncio.current_task():
            raise ConfigError("this task is in the middle of an answer", "go to its end first, or close it")


@contextmanager
def _own_thread() -> Iterator[Executor]:
    """One and the same for all that a piece of work does; it has nothing left to do when the block ends."""
    thread = ThreadPoolExecutor(1, "statekv")
    try:
        yield thread
    finally:
        thread.shutdown(wait=False)


async def _finished(
    thread: Executor, work: Callable[..., T], *arguments: Any, on_cancel: Callable[[], None] | None = None
) -> T:
    """What the work returns, on that thread. Cancelled, this waits for its end all the same."""
    future = asyncio.get_running_loop().run_in_executor(thread, work, *arguments)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        if on_cancel is not None:
            on_cancel()
        while not future.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([future])
        future.exception()  # taken note of: the cancellation is what is told
        raise
