"""A video opened, and a file's frames with a note of how far they have been read, to go on another day."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any

from statekv.errors import VideoError
from statekv.video.address import PathOrUrl, check_same, digest_of, display_name, local_path, locate
from statekv.video.file import VideoInfo, probe, read_frames
from statekv.video.frame import Frame
from statekv.video.live import LiveSettings, LiveSource
from statekv.video.source import Source


@dataclass(frozen=True)
class Reading:
    """How a video is read: as with `read_frames`."""

    fps: float | None = None
    max_frames: int | None = None
    stream: int | None = None
    until_seconds: float | None = None
    ahead: int = 0
    max_pixels: int | None = None
    max_decoded: int | None = None


class ResumableVideo(Source):
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
        self, source: PathOrUrl, reading: Reading, drawn: int = 0, ended: bool = False, digest: str | None = None
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

    def fork(self) -> ResumableVideo:
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
    def resumed(cls, facts: dict[str, Any], source: PathOrUrl | None = None) -> ResumableVideo:
        """Go on where reading stopped.

        Args:
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

    def __repr__(self) -> str:
        return f"{type(self).__name__}({display_name(self.source)!r}, drawn={self.drawn}, ended={self.ended})"

    def check(self) -> None:
        """Raise a VideoError unless the file is still the one whose frames were drawn."""
        check_same(self.source, self.digest)

    def _open(self) -> Generator[Frame, None, None]:
        r = self.reading
        if self.drawn:
            self.check()
        frames = read_frames(self.source, **dataclasses.asdict(r))
        try:
            for _ in range(self.drawn):
                next(frames, None)
        except BaseException:
            frames.close()
            raise
        return frames


class _Withheld(ResumableVideo):
    """A video at an address that was not saved whole."""

    def __next__(self) -> Frame:
        rule = f"{self.source}: its address held a password or a token, which is not saved"
        raise VideoError(rule, "give the address with source")


def open_video(
    source: PathOrUrl,
    settings: LiveSettings | None = None,
    stream: int | None = None,
    realtime: bool = False,
    info: VideoInfo | None = None,
) -> Source:
    """Open whatever has pictures: a file, or a URL of known length, waits for its reader; all else is live.

    Args:
        source: path or URL of a video, a camera (/dev/video0), or "-" for standard input.
        settings: how it is read, None: every frame; a file is decoded `depth` frames ahead, and tells its own length.
        stream: which video stream, from 0; None takes the one that FFmpeg thinks best.
        realtime: show a file no faster than it would be played, as if it were live.
        info: what `probe` says of it; None: it is asked where that matters.

    Raises:
        VideoError: it cannot be opened or holds no video.
        ConfigError: there is no such stream.
    """
    settings = settings or LiveSettings()
    if locate(source).live:
        return LiveSource(source, settings, stream)
    info = info or probe(source, stream, settings.max_pixels)
    until = settings.until_seconds
    if realtime or not (info.finite or local_path(source) is not None):
        ends = None if until is None else until - info.start_seconds
        return LiveSource(source, replace(settings, duration_seconds=info.duration_seconds, until_seconds=ends), stream)
    caps = {"max_pixels": settings.max_pixels, "max_decoded": settings.max_decoded}
    return ResumableVideo(source, Reading(settings.fps, settings.max_frames, stream, until, settings.depth, **caps))
