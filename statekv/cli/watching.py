"""A stream that goes on between its questions: `statekv watch` at work."""

from __future__ import annotations

import json
import time
from contextlib import closing
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, TextIO

from statekv.cli.durations import clock
from statekv.cli.keeping import Keeper
from statekv.cli.keyboard import Questions
from statekv.cli.watch_views import Facts, Plain, Screen
from statekv.errors import MemoryLimitError, StateKVError

if TYPE_CHECKING:
    from statekv.engine.progress import Progress
    from statekv.engine.session import Session

_WAIT_SECONDS = 0.1


class Standing:
    """A question that is asked again and again, by the stream's time."""

    def __init__(self, every_seconds: float, question: str) -> None:
        self.question = question
        self._every_seconds = every_seconds
        self._due_seconds: float | None = None

    def due(self, pts_seconds: float) -> bool:
        """Say whether it is time; true once for all the times that were missed."""
        if self._due_seconds is None:
            self._due_seconds = pts_seconds + self._every_seconds
        if pts_seconds < self._due_seconds:
            return False
        missed = (pts_seconds - self._due_seconds) // self._every_seconds
        self._due_seconds += (missed + 1) * self._every_seconds
        return True


class Watching:
    """A stream that goes on between its questions.

    Args:
        session: the stream.
        facts: what is shown of it.
        questions: where they come in.
        view: where answers go.
        standing: a question that comes back.
        log: where answers are written down.
        keeper: saves the stream.
    """

    def __init__(
        self,
        session: Session,
        facts: Facts,
        questions: Questions,
        view: Screen | Plain,
        standing: Standing | None,
        log: TextIO | None,
        keeper: Keeper,
    ) -> None:
        self._session, self._facts, self._questions, self._view = session, facts, questions, view
        self._standing, self._log, self._keeper = standing, log, keeper
        self._standing_due = False
        self._answers = 0

    def run(self) -> int:
        """Watch and answer until there is nothing left to do, then save; the exit code."""
        code = 0
        try:
            while not self._questions.quit:
                if not self._facts.ended:
                    code = self._watch()
                elif not self._questions:
                    if self._questions.closed:
                        break
                    time.sleep(_WAIT_SECONDS)
                if self._keeper.due():
                    self._save()
                self._answer_all()
        except KeyboardInterrupt:
            self._facts.ended = self._facts.ended or "interrupted"
        finally:
            self._save()
        return code or int(self._keeper.failed)

    def summary(self) -> str:
        """The last line."""
        told = [
            self._facts.ended or "left",
            *self._facts.lines(),
            f"{self._answers} answer{'' if self._answers == 1 else 's'}",
        ]
        return " · ".join(filter(None, told))

    def _watch(self) -> int:
        """Let the stream go on until somebody asks, it is to be saved or it ends."""
        code = 0
        try:
            self._session.watch(on_step=self._on_step, pause=self._pause)
        except StateKVError as error:
            if isinstance(error, MemoryLimitError):
                self._keeper.spare()
            self._view.say(str(error))
            code = 1
        except Exception:
            self._keeper.spare()
            raise
        if code or not self._pause():
            self._facts.ended = "ended"
            self._save()
        return code

    def _save(self) -> None:
        self._keeper.save(self._facts.pts_seconds)
        self._facts.saved = self._keeper.told

    def _on_step(self, progress: Progress) -> None:
        self._facts.step(progress)
        self._view.step()
        if self._standing is not None and self._standing.due(progress.pts_seconds):
            self._standing_due = True

    def _pause(self) -> bool:
        # Before the first frame there is nothing to ask about: questions wait for it.
        asked = bool(self._questions) and self._session.frames > 0
        return self._questions.quit or self._standing_due or asked or self._keeper.due()

    def _answer_all(self) -> None:
        if self._standing is not None and self._standing_due:
            self._standing_due = False
            self._answer(self._standing.question, standing=True)
        while not self._questions.quit and (self._session.frames or self._facts.ended):
            question = self._questions.take()
            if question is None:
                return
            self._answer(question, standing=False)

    def _answer(self, question: str, standing: bool) -> None:
        before, text = self._session.seconds.answer, ""
        self._view.asked(question, clock(self._facts.pts_seconds))
        try:
            # Closed at once where the reader has gone: what is in the middle of an answer cannot be saved.
            with closing(self._session.stream(question)) as pieces:
                for piece in pieces:
                    text += piece
                    self._view.piece(piece)
        except StateKVError as error:
            self._view.say(str(error))
            return
        finally:
            self._view.answered()
        self._answers += 1
        if self._log is not None:
            self._log.write(json.dumps(self._record(question, text, standing, before), ensure_ascii=False) + "\n")
            self._log.flush()

    def _record(self, question: str, text: str, standing: bool, before: float) -> dict[str, Any]:
        live = self._session.live
        return {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "pts_seconds": self._facts.pts_seconds,
            "question": question,
            "text": text,
            "standing": standing,
            "answer_seconds": self._session.seconds.answer - before,
            "frames": self._session.frames,
            "dropped": live.dropped if live is not None else 0,
            "gaps": live.gaps if live is not None else 0,
        }
