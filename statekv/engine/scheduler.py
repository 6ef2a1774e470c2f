"""Several sessions on one model, stepped together where that can be: every one that has frames steps once a round."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from threading import Lock

from statekv.engine.ingest import PendingStep
from statekv.engine.interrupts import deferred_interrupts
from statekv.engine.progress import Progress
from statekv.engine.session import Session
from statekv.errors import ConfigError
from statekv.runner.batching import batch_key, stream_key
from statekv.runner.runner import ModelRunner

OnStep = Callable[[Session, Progress], None]
# A session is no longer watched: its source has ended (None), or this is why it cannot go on.
OnEnd = Callable[[Session, Exception | None], None]

_POLL_SECONDS = 0.01


class Scheduler:
    """Watches sessions, round by round: each that has the frames of a step takes one, and no second one.

    So nobody waits longer than for one step of each of the others, however fast their sources are. Steps of equal
    shape and settings run as one batch (`batch_key`); the batches, and the steps that go alone, run in
    the order in which their first sessions have waited. A session that another thread is using just then, for a
    question, has its step in a later round.

    Sessions may be added, asked and closed from any thread while rounds run on one.

    Args:
        runner: of all of them.
        on_step: called after each step of a session, on the thread of the rounds.
        on_end: called when a session leaves because its source has ended or it cannot go on; the others go on.
    """

    def __init__(self, runner: ModelRunner, on_step: OnStep | None = None, on_end: OnEnd | None = None) -> None:
        self._runner = runner
        self._on_step, self._on_end = on_step, on_end
        self._mutex = Lock()
        self._sessions: dict[Session, int] = {}  # in the order of their coming; with the round of their last step
        self._number = 0

    def __len__(self) -> int:
        return len(self._sessions)

    def add(self, session: Session) -> None:
        """Watch a session from the next round on.

        Raises:
            ConfigError: it belongs to another engine, or has no source.
        """
        if session.runner is not self._runner:
            raise ConfigError("this session belongs to another engine", "watch it with the engine that opened it")
        session.queue.drawn()
        with self._mutex:
            self._sessions.setdefault(session, self._number)

    def remove(self, session: Session) -> None:
        """Watch a session no longer; nothing happens where it is not watched."""
        with self._mutex:
            self._sessions.pop(session, None)

    def watch(self, pause: Callable[[], bool] | None = None) -> None:
        """Rounds until every source has ended, or `pause`, asked between them, says so."""
        while len(self) and not (pause is not None and pause()):
            if not self.step():
                time.sleep(_POLL_SECONDS)

    def step(self) -> int:
        """One step of each session that has its frames and is free.

        Returns:
            How many have stepped or left; 0: nobody was ready.
        """
        with self._mutex:
            self._number += 1
            order = {session: number for number, session in enumerate(self._sessions)}
            waiting = sorted(self._sessions, key=self._sessions.__getitem__)  # equal ones in the order of their coming
        told: list[Callable[[], None]] = []
        with ExitStack() as held, deferred_interrupts():
            taken = [session for session in waiting if self._take(session, held)]
            drawn = [found for session in taken if (found := self._draw(session, told)) is not None]
            self._look(drawn)
            entering = [pair for pair in drawn if self._enter(*pair, told)]
            for batch in self._batches(entering):
                # In the order of their coming, so that carried caches that lie together stay as they lie.
                self._prefill(sorted(batch, key=lambda pair: order[pair[0]]), told)
        for tell in told:  # callbacks may ask and close: nobody's turn is taken any more
            tell()
        return len(told)

    def _take(self, session: Session, held: ExitStack) -> bool:
        if not session.lock.acquire(wait=False):
            return False
        held.callback(session.lock.release)
        return True

    def _draw(self, session: Session, told: list[Callable[[], None]]) -> tuple[Session, PendingStep] | None:
        """A session's next step, if its frames are there."""
        if session.answering:
            return None
        try:
            if session.closed:
                self._ended(session, None, told)
                return None
            session.check_growing()
            found = self._drawn(session)
            if isinstance(found, PendingStep):
                return session, found
            if found is not None:
                self._stepped(session, found, told)
            elif session.queue.ended:
                self._ended(session, None, told)
        except Exception as error:
            self._ended(session, error, told)
        return None

    def _look(self, drawn: Sequence[tuple[Session, PendingStep]]) -> None:
        """Send pictures of live sources through the vision tower together, where their steps may go together too."""
        model = self._runner.model
        found: dict[Hashable, list[tuple[Session, PendingStep]]] = {}
        for session, step in drawn:
            kin, expected = stream_key(model, session.state), session.state.frames_expected
            if kin is not None and not session.queue.ahead.looked:
                shapes = tuple(frame.data.shape for frame in step.frames)
                found.setdefault((kin, expected, shapes), []).append((session, step))
        for group in found.values():
            if len(group) == 1:
                continue
            try:
                seen = self._runner.encode([step.frames for _, step in group], group[0][0].state.frames_expected)
            except Exception:
                continue  # each looks at its own frames, and fails by itself
            for (session, _), looked in zip(group, seen, strict=True):
                session.queue.ahead.offer(looked)

    def _enter(self, session: Session, step: PendingStep, told: list[Callable[[], None]]) -> bool:
        """Find a step's place in its stream."""
        try:
            step.enter()
        except Exception as error:
            session.queue.undo(step, error)
            self._ended(session, error, told)
            return False
        return True

    def _drawn(self, session: Session) -> PendingStep | Progress | None:
        source = session.queue.drawn()
        while session.queue.ahead.ready(source) and (frame := session.queue.draw(look=False)) is not None:
            found = session.queue.put(frame)
            if found is not None:
                return found
        return None

    def _batches(self, entering: Sequence[tuple[Session, PendingStep]]) -> list[list[tuple[Session, PendingStep]]]:
        """Those that go together, in the order in which the first of each has waited."""
        found: dict[Hashable, list[tuple[Session, PendingStep]]] = {}
        for session, step in entering:
            alike = batch_key(self._runner.model, session.state, step.segments)
            found.setdefault(id(session) if alike is None else alike, []).append((session, step))
        return list(found.values())

    def _prefill(self, batch: Sequence[tuple[Session, PendingStep]], told: list[Callable[[], None]]) -> None:
        states = [session.state for session, _ in batch]
        if len(batch) == 1 or not self._runner.gather_batch(states):
            for session, step in batch:
                self._finish([(session, step)], step.prefill, told)
            return

        def together() -> None:
            began = time.perf_counter()
            self._runner.prefill_batch(states, [step.segments[-1] for _, step in batch])
            for _, step in batch:
                step.prefill_seconds = (time.perf_counter() - began) / len(batch)

        self._finish(batch, together, told)

    def _finish(
        self, batch: Sequence[tuple[Session, PendingStep]], run: Callable[[], None], told: list[Callable[[], None]]
    ) -> None:
        try:
            run()
        except BaseException as error:
            for session, step in batch:
                session.queue.undo(step, error)
            if not isinstance(error, Exception):
                raise
            for session, _ in batch:
                self._ended(session, error, told)
            return
        for session, step in batch:
            self._stepped(session, session.queue.finish(step), told)

    def _stepped(self, session: Session, progress: Progress, told: list[Callable[[], None]]) -> None:
        with self._mutex:
            if session in self._sessions:
                self._sessions[session] = self._number
        on_step = self._on_step
        told.append(lambda: on_step(session, progress) if on_step is not None else None)

    def _ended(self, session: Session, error: Exception | None, told: list[Callable[[], None]]) -> None:
        self.remove(session)
        on_end = self._on_end
        told.append(lambda: on_end(session, error) if on_end is not None else None)
