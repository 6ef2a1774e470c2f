"""A video's frames, with a note of how far they have been read, so that reading can go on another day."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

from statekv.errors import ConfigError, VideoError
from statekv.video.address import Source, check_same, digest_of, display_name, local_path
from statekv.video.file import read_frames
from statekv.video.frame import Frame


@dataclass(frozen=True)
class Reading:
    """How a video is read.

    Attributes:
        fps, max_frames, stream, until_seconds: as `read_frames`.
        ahead: frames to decode ahead.
    """

    fps: float | None = None
    max_frames: int | None = None
    stream: int | None = None
    until_seconds: float | None = None
    ahead: int = 0


class ResumableVideo(Iterator[Frame]):
    """The sampled frames of a video, from its beginning or from where reading stopped.

    A file is decoded from its beginning again, and the frames that were drawn before are skipped: so the frames that
    follow are those that would have followed, to the bit.

    Args:
        source: path or URL.
        reading: how it is read.
        drawn: frames that were drawn before.
        ended: whether the end was reached then; nothing is opened any more.
        digest: of the file that those came from; None: not known.
    """

    def __init__(
        self, source: Source, reading: Reading, drawn: int = 0, ended: bool = False, digest: str | None = None
    ) -> None:
        self.source = source
        self.reading = reading
        self.drawn = drawn
        self.ended = ended
        self.digest = digest or digest_of(source)
        self._frames: Generator[Frame, None, None] | None = None

    def __next__(self) -> Frame:
        if self.ended:
            raise StopIteration
        if self._frames is None:
            self._frames = self._open()
        frame = next(self._frames, None)
        if frame is None:
            self.ended = True
            raise StopIteration
        self.drawn += 1
        return frame

    def close(self) -> None:
        """Stop reading; the next frame drawn would be read by opening the source anew."""
        if self._frames is not None:
            self._frames.close()
        self._frames = None

    def again(self) -> ResumableVideo:
        """The same frames from here on, read separately."""
        return ResumableVideo(self.source, self.reading, self.drawn, self.ended, self.digest)

    def facts(self) -> dict[str, Any]:
        """What `resumed` needs, without passwords and access tokens."""
        path = local_path(self.source)
        address = display_name(self.source) if path is None else str(path.absolute())
        return {
            "live": False,
            "address": address,
            "complete": path is not None or address == os.fspath(self.source),
            "digest": self.digest,
            "drawn": self.drawn,
            "ended": self.ended,
            "reading": dataclasses.asdict(self.reading),
        }

    @classmethod
    def resumed(cls, facts: dict[str, Any], source: Source | None = None) -> ResumableVideo:
        """Go on where reading stopped.

        Args:
            facts: from `facts`.
            source: where the video is now; None: where it was.

        Raises:
            VideoError: `source` is not the file that was read before.
        """
        reading = Reading(**facts["reading"])
        if source is None and not facts["complete"] and not facts["ended"]:
            return _Withheld(facts["address"], reading, facts["drawn"], digest=facts["digest"])
        found = cls(source or facts["address"], reading, facts["drawn"], facts["ended"], facts["digest"])
        if source is not None:
            found.check()
        return found

    def check(self) -> None:
        """Raise a VideoError unless the file is still the one whose frames were drawn."""
        check_same(self.source, self.digest)

    def _open(self) -> Generator[Frame, None, None]:
        r = self.reading
        if self.drawn:
            self.check()
        frames = read_frames(self.source, r.fps, r.max_frames, r.stream, r.ahead, r.until_seconds)
        try:
            for _ in range(self.drawn):
                next(frames, None)
        except BaseException:
            frames.close()
            raise
        return frames


class _Withheld(ResumableVideo):
    """Footage at an address that was not saved whole."""

    def __next__(self) -> Frame:
        rule = f"{self.source}: its address held a password or a token, which is not saved"
        raise VideoError(rule, "give the address with source")


@dataclass(frozen=True, slots=True)
class ResumePoint:
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
        """As JSON: `ResumePoint(**facts)` is the same."""
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


def left_at_the_start(source: Source, stream: int | None) -> ResumePoint:
    """A source of which nothing has been seen yet."""
    return ResumePoint(display_name(source), digest_of(source), stream)
