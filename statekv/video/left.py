"""Where a live source was left, from which another process can go on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from statekv.errors import ConfigError
from statekv.video.digest import check_same, digest_of
from statekv.video.source import Source, display_name, local_path


@dataclass(frozen=True, slots=True)
class Left:
    """A live source at the moment at which it was left.

    Attributes:
        name: of the source, without passwords and access tokens.
        digest: of a file that was played as live; None: it was no file.
        stream: which video stream, from 0; None: the best one.
        duration_seconds, until_seconds: as `LiveSettings`.
        seconds: stream time of the newest frame that was handed out; None: there was none.
        began_at: the moment of its second 0, in seconds since 1970; None: it had not begun.
        kept: sampled frames.
        dropped, gaps, gap_seconds: as `LiveStatus`.
    """

    name: str
    digest: str | None = None
    stream: int | None = None
    duration_seconds: float | None = None
    until_seconds: float | None = None
    seconds: float | None = None
    began_at: float | None = None
    kept: int = 0
    dropped: int = 0
    gaps: int = 0
    gap_seconds: float = 0.0

    def facts(self) -> dict[str, Any]:
        """As JSON: `Left(**facts)` is the same."""
        return dataclasses.asdict(self)

    def check(self, source: Source) -> None:
        """Raise unless `source` can follow: any live source after another, after a file just that file.

        Raises:
            VideoError: another file.
            ConfigError: a file after a live source, or the other way round.
        """
        played = local_path(source) is not None
        if played != (self.digest is not None):
            then, now = (self.name, "a file") if played else (f"the file {self.name}", "none")
            raise ConfigError(f"{then} was watched before, {display_name(source)} is {now}", "name the source of then")
        check_same(source, self.digest)


def left_at_the_start(source: Source, stream: int | None) -> Left:
    """A source of which nothing has been seen yet."""
    return Left(display_name(source), digest_of(source), stream)
