"""A lock that is fair, for a model or a session that several threads use."""

from __future__ import annotations

from collections import deque
from threading import Lock, get_ident


class FairLock:
    """A lock that goes to whoever has waited longest, and that its holder may take again.

    threading's locks promise no order. A thread that lets go and asks again at once mostly has the lock back before
    anybody who waits is awake, so that a stream which is stepped in a loop would keep questions out for long.
    """

    def __init__(self) -> None:
        self._mutex = Lock()
        self._owner: int | None = None
        self._depth = 0
        self._waiting: deque[tuple[int, Lock]] = deque()  # threads, each with the bell that wakes it

    def acquire(self, wait: bool = True) -> bool:
        """Take the lock; without waiting, False where another thread has it or waits for it."""
        me = get_ident()
        with self._mutex:
            # Nobody waits where nobody owns: the lock is handed over, never just left.
            if self._owner in (None, me):
                self._owner, self._depth = me, self._depth + 1
                return True
            if not wait:
                return False
            bell = Lock()
            bell.acquire()
            self._waiting.append((me, bell))
        try:
            bell.acquire()
        except BaseException:  # Ctrl-C
            with self._mutex:
                if (me, bell) in self._waiting:
                    self._waiting.remove((me, bell))
                else:
                    self._hand_over()
            raise
        return True

    def release(self) -> None:
        """Give back what one `acquire` took."""
        with self._mutex:
            assert self._owner == get_ident(), "left by a thread that does not have it"
            self._depth -= 1
            if not self._depth:
                self._hand_over()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _hand_over(self) -> None:
        self._owner, self._depth = None, 0
        if self._waiting:
            self._owner, bell = self._waiting.popleft()
            self._depth = 1
            bell.release()
