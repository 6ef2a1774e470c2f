"""A source that does not wait: decoded on a thread at its own pace, reconnected when it goes away."""

from __future__ import annotations

import logging
import math
import threading
import time
import warnings
from dataclasses import asdict, dataclass, replace
from typing import Any

from statekv.errors import ConfigError, VideoError, VideoWarning
from statekv.video.address import PathOrUrl, check_same, digest_of, display_name, local_path, locate, nothing_decodes
from statekv.video.clock import LiveClock
from statekv.video.decode import Damage, Track, open_track, rgb
from statekv.video.frame import Frame
from statekv.video.sampling import Sampler
from statekv.video.source import FrameBuffer, LiveStatus, Source

_log = logging.getLogger(__name__)

_TIMEOUTS_SECONDS = (10.0, 20.0)  # to connect, to read on; HLS is silent for the length of a segment
# FFmpeg looks at five seconds of a stream by default before it hands out the first packet.
_OPTIONS = {"analyzeduration": "200000"}
_FIRST_DELAY_SECONDS, _LONGEST_DELAY_SECONDS = 0.5, 30.0
_JOIN_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class LiveSettings:
    """How a live source is read.

    Attributes:
        fps: frames per second at most; None keeps every frame.
        max_frames: frames to keep in all; None: no limit.
        duration_seconds: length of a file that is played as live, over which max_frames are spread; else None.
        depth: frames that wait for their reader at most.
        max_lag_seconds: how long a frame waits before a newer one pushes it out.
        reconnect_seconds: how long a source that went away is waited for; 0: its end is the end.
        until_seconds: stream time at which reading ends; None: it does not.
        timeouts_seconds: to connect, and of silence that counts as being away.
        max_pixels: of a picture; None: no limit.
        max_decoded: frames of a file that are decoded, also those that are not kept; None: no limit.
    """

    fps: float | None = None
    max_frames: int | None = None
    duration_seconds: float | None = None
    depth: int = 8
    max_lag_seconds: float = 2.0
    reconnect_seconds: float = 300.0
    until_seconds: float | None = None
    timeouts_seconds: tuple[float, float] = _TIMEOUTS_SECONDS
    max_pixels: int | None = None
    max_decoded: int | None = None


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
        return asdict(self)

    def check(self, source: PathOrUrl) -> None:
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


def left_at_the_start(source: PathOrUrl, stream: int | None) -> ResumePoint:
    """A source of which nothing has been seen yet."""
    return ResumePoint(display_name(source), digest_of(source), stream)


class LiveSource(Source):
    """Sampled frames of a live source, whose times are seconds since its first frame.

    Sources that hand out frames before their time (a file, HTTP, a pipe) are read no faster than their stamps say.
    Frames that the reader does not take in time are dropped and counted. A source that goes away is called again, at
    growing intervals; the first frame afterwards tells the gap.

    Args:
        source: path, URL, camera, or "-" for standard input.
        settings: how it is read.
        stream: which video stream, from 0; None takes the one that FFmpeg thinks best.
        left: where another one was left, whose times this one goes on with: the time in between is a gap. A file goes
            on where it was.

    Raises:
        VideoError: it cannot be opened or holds no video.
        ConfigError: there is no such stream, or the source cannot follow the one that was left.
    """

    live = True

    def __init__(
        self, source: PathOrUrl, settings: LiveSettings, stream: int | None = None, left: ResumePoint | None = None
    ) -> None:
        if left is not None:
            left.check(source)
        self._left = left or left_at_the_start(source, stream)
        self._address = locate(source)
        self._name = display_name(source)
        self._source, self._stream, self._settings = source, stream, settings
        self._sampler = Sampler(settings.fps, settings.max_frames, 0.0, settings.duration_seconds)
        self._clock = LiveClock()
        self._newest = FrameBuffer(settings.depth, settings.max_lag_seconds)
        self._due_seconds: float | None = None  # of the frame that was handed out last, by time.monotonic
        self._seconds = self._left.seconds  # of the frame that was handed out last
        self._gaps, self._gap_seconds, self._untold_gap_seconds = self._left.gaps, self._left.gap_seconds, 0.0
        self._seen_before = -math.inf  # frames of a file up to here
        self._go_on()
        self._connected = False
        self._finished = False  # all that was asked for has been seen
        self._refused: Exception | None = None
        self._opened, self._stopped = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="statekv-live", daemon=True)
        self._thread.start()
        self._opened.wait()
        if self._refused is not None:
            raise self._refused

    @property
    def status(self) -> LiveStatus:
        """How it is doing now."""
        lag = 0.0 if self._due_seconds is None else max(0.0, time.monotonic() - self._due_seconds)
        dropped = self._left.dropped + self._newest.dropped
        return LiveStatus(self._connected, lag, dropped, self._gaps, self._gap_seconds)

    def facts(self) -> dict[str, Any]:
        """What another one needs to go on: `ResumePoint(**facts["left"])`."""
        began, status = self._clock.began_seconds, self.status
        left = replace(
            self._left,
            name=self._name,
            duration_seconds=self._settings.duration_seconds,
            until_seconds=self._settings.until_seconds,
            seconds=self._seconds,
            began_at=None if began is None else time.time() - time.monotonic() + began,
            kept=self._sampler.kept,
            dropped=status.dropped,
            gaps=status.gaps,
            gap_seconds=status.gap_seconds,
        )
        return Unopened(left).facts()

    def ready(self, timeout_seconds: float) -> bool:
        """Wait until the next frame, or the end, is there; False if it is not by then."""
        return self._newest.ready(timeout_seconds)

    def __next__(self) -> Frame:
        try:
            found = self._newest.get()
        except VideoWarning as complaint:
            warnings.warn(complaint, stacklevel=2)
            found = None
        if found is None:
            raise StopIteration
        frame, self._due_seconds = found
        self._seconds = frame.pts_seconds
        return frame

    def __repr__(self) -> str:
        return f"LiveSource({self._name!r}, pts_seconds={self._seconds}, {self.status})"

    def close(self) -> None:
        """Stop reading. A read that hangs ends with its timeout; nothing waits for it."""
        self._stopped.set()
        self._newest.clear()
        self._newest.end()
        if self._thread is not threading.current_thread():
            self._thread.join(_JOIN_SECONDS)

    def _go_on(self) -> None:
        """Set clock and sampler to where the source was left."""
        seconds, began_at = self._left.seconds, self._left.began_at
        if seconds is None or began_at is None:
            return
        if local_path(self._source) is not None:
            self._seen_before = seconds  # which brings clock and sampler there too
            return
        self._clock.go_on(seconds, time.time() - began_at, time.monotonic())
        self._sampler.kept = self._left.kept

    def _run(self) -> None:
        end: Exception | None = None
        try:
            end = self._connections()
        except Exception as error:
            end = error
        self._connected = False
        if not self._opened.is_set():
            self._refused = end
            self._opened.set()
        self._newest.end(end)

    def _connections(self) -> VideoWarning | None:
        """One connection after the other, until the source has ended; returns what is to be said about that."""
        away_since, delay = time.monotonic(), _FIRST_DELAY_SECONDS
        while True:
            seen = self._clock.last_seconds
            end = self._connection()
            self._connected = False
            if self._finished or self._stopped.is_set():
                return end
            now = time.monotonic()
            if self._clock.last_seconds != seen:
                away_since, delay = now, _FIRST_DELAY_SECONDS
            left = away_since + self._settings.reconnect_seconds - now
            if left <= 0:
                told = f"{self._name} went away {self._settings.reconnect_seconds:g} s ago and has not come back"
                return VideoWarning(told)
            _log.info("%s is away; it is called again in %.1f s, for %.0f s more", self._name, min(delay, left), left)
            self._stopped.wait(min(delay, left))
            delay = min(2 * delay, _LONGEST_DELAY_SECONDS)

    def _connection(self) -> VideoWarning | None:
        """Read the source for as long as it is there."""
        damage = Damage()
        try:
            how = self._settings
            with open_track(self._source, self._stream, how.timeouts_seconds, _OPTIONS, how.max_pixels) as track:
                # A broadcast that is a recording when it is called again has come to its end.
                recorded = track.finite
                if recorded and self._clock.last_seconds is not None:
                    self._finished = True
                    return None
                self._connected = True
                self._opened.set()
                self._show(track, damage)
        except VideoError:
            if not self._opened.is_set():
                raise
            return None
        if recorded or not self._address.returns or not self._settings.reconnect_seconds:
            self._finished = True
            if self._clock.last_seconds is None and not self._stopped.is_set():
                raise nothing_decodes(self._source)
            cut_off = recorded and damage.stop_reason
            return VideoWarning(f"{self._name}: {damage.stop_reason}") if cut_off else None
        return None

    def _show(self, track: Track, damage: Damage) -> None:
        """Sample the pictures of one connection, none before its time."""
        before = self._clock.last_seconds
        self._clock.reconnect()
        for index, picture in enumerate(track.pictures(damage, at_once=True)):
            now = time.monotonic()
            pts = self._clock.tick(track.seconds(picture.pts) if track.stamped else None, now)
            if before is not None and index == 0:
                self._gaps += 1
                self._gap_seconds += pts - before
                self._untold_gap_seconds += pts - before
                _log.info("%s is back after a gap of %.2f s", self._name, pts - before)
            until = self._settings.until_seconds
            if until is not None and pts >= until:
                self._finished = True
                return
            if pts <= self._seen_before:
                self._sampler.keep(pts)
                self._clock.began_seconds = now - pts
                continue
            due = now
            if self._address.paced and self._clock.began_seconds is not None:
                due = self._clock.began_seconds + pts
                self._stopped.wait(max(0.0, due - now))
            if self._stopped.is_set():
                return
            if self._sampler.keep(pts):
                duration = track.seconds(getattr(picture, "duration", None)) if track.stamped else None
                self._newest.put(Frame(rgb(picture), pts, duration or 0.0, self._untold_gap_seconds), due)
                self._untold_gap_seconds = 0.0
                if self._sampler.exhausted:
                    self._finished = True
                    return


class Unopened(Source):
    """A live source that was left, and that nobody has opened again."""

    def __init__(self, left: ResumePoint) -> None:
        self._left = left

    def __next__(self) -> Frame:
        raise VideoError(f"{self._left.name} was live, and has not been opened again", "say where it is with source")

    def facts(self) -> dict[str, Any]:
        """As those of the source that was left."""
        return {"live": True, "left": self._left.facts()}
