"""A session that is saved while it is watched."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from statekv.cli.durations import clock
from statekv.errors import SaveError

if TYPE_CHECKING:
    from statekv.engine.session import Session


class Keeper:
    """Saves a session now and then, and at the end.

    A save that fails is told once, not each time that it fails again; the stream goes on. What has been saved already
    is intact then.

    Args:
        session: what is watched.
        folder: where it is kept; None: nowhere.
        every_seconds: between two saves; None: at the end alone.
        say: how a failure is told.
        restored: whether the session was restored from that folder, which holds it as it is.

    Attributes:
        told: where things stand, for the view; empty as long as nothing was tried.
        failed: whether the newest try failed.
    """

    def __init__(
        self,
        session: Session,
        folder: Path | None,
        every_seconds: float | None,
        say: Callable[[str], None],
        restored: bool = False,
    ) -> None:
        self._session, self._folder, self._every_seconds, self._say = session, folder, every_seconds, say
        self._tried_at = time.monotonic()
        self._saved_frames = session.frames if restored else 0
        self._spared = False
        self.told = ""
        self.failed = False

    def due(self) -> bool:
        """Whether it is time: there is something new, and the last try is long enough ago."""
        if self._every_seconds is None or time.monotonic() - self._tried_at < self._every_seconds:
            return False
        return self._something_new()

    def save(self, pts_seconds: float) -> None:
        """Save what is new, if anything is.

        Args:
            pts_seconds: time of the newest step.
        """
        if self._folder is None or not self._something_new():
            return
        frames = self._session.frames
        try:
            self._session.save(self._folder)
        except SaveError as error:
            if not self.failed:
                again = "; it will be tried again" if self._every_seconds is not None else ""
                self._say(f"{error}{again}")
                self.told = f"not saved since {clock(pts_seconds)}"
            self.failed = True
        else:
            self.failed, self._saved_frames = False, frames
            self.told = f"saved at {clock(pts_seconds)}"
        self._tried_at = time.monotonic()

    def spare(self) -> None:
        """The session cannot go on any more: a save that can is not replaced by it."""
        self._spared = bool(self._saved_frames)

    def _something_new(self) -> bool:
        return self._session.frames > self._saved_frames and not self._spared
