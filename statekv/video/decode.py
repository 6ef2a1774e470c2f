"""One video stream of an open container: the only door to FFmpeg for reading."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import av
import torch
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from statekv.errors import ConfigError
from statekv.video.address import (
    PathOrUrl,
    StandardInput,
    check_there,
    display_name,
    explain,
    is_stdin,
    local_path,
    locate,
    nothing_decodes,
    unusable,
)
from statekv.video.clock import Clock, parse_timestamp
from statekv.video.frame import Orientation
from statekv.video.sampling import Sampler

_UNSTAMPED = ("mjpeg", "mpjpeg", "h264", "hevc", "m4v", "image2pipe", "jpeg_pipe")
# Metadata that is not UTF-8 ends PyAV 18 unless it is told otherwise; 19 reads it, and knows no such argument.
_LENIENT: dict[str, Any] = {"metadata_errors": "replace"} if av.__version__.startswith("18.") else {}
_URL_TIMEOUTS_SECONDS = (30.0, 60.0)  # to connect, to read on


@dataclass(frozen=True, slots=True)
class Track:
    """One video stream of an open container."""

    container: InputContainer
    videos: list[VideoStream]
    video: VideoStream

    @property
    def start_seconds(self) -> float:
        return self.seconds(self.video.start_time) or 0.0

    @property
    def duration_seconds(self) -> float | None:
        if self.video.duration:
            return self.seconds(self.video.duration)
        # Matroska tells each stream's length in a tag, and counts it from time zero.
        seconds = parse_timestamp(self.video.metadata.get("DURATION", ""))
        if seconds is None:
            seconds = (self.container.duration or 0) / av.time_base
        if "matroska" in self.container.format.name:
            seconds -= self.start_seconds
        return seconds if seconds > 0 else None

    @property
    def frame_seconds(self) -> float:
        return float(1 / self.video.average_rate) if self.video.average_rate else 0.0

    def seconds(self, ticks: int | None) -> float | None:
        return None if ticks is None or self.video.time_base is None else float(ticks * self.video.time_base)

    def sampler(self, fps: float | None, max_frames: int | None, until_seconds: float | None) -> Sampler:
        ends = (self.duration_seconds, until_seconds and until_seconds - self.start_seconds)
        return Sampler(fps, max_frames, self.start_seconds, min((end for end in ends if end), default=None))

    def clock(self) -> Clock:
        return Clock(self.start_seconds, self.frame_seconds)

    @property
    def stamped(self) -> bool:
        """False where frames bear no times of their own, and FFmpeg makes some up from a frame rate."""
        return self.container.format.name not in _UNSTAMPED

    def pictures(self, damage: Damage, at_once: bool = False) -> Iterator[VideoFrame]:
        """Decode in presentation order, noting on the way what would not decode.

        `at_once`: hand out each picture as soon as it is there, at the price of decoding several at a time.
        """
        self.video.thread_type = "SLICE" if at_once else "AUTO"
        for packet in self._packets(damage):
            try:
                pictures = self.video.decode(packet)
            except FFmpegError:
                damage.pieces += 1
                continue
            yield from pictures

    def packet_times(self) -> Iterator[float]:
        """Times of the packets that hold pictures, in decode order."""
        clock = self.clock()
        for packet in self._packets(Damage()):
            if packet is not None and packet.size and not packet.is_discard:
                pts = self.seconds(packet.pts)
                yield clock.tick(None, self.seconds(packet.duration))[0] if pts is None else pts

    def _packets(self, damage: Damage) -> Iterator[Packet[VideoStream] | None]:
        try:
            yield from self.container.demux(self.video)
        except FFmpegError as error:
            damage.stop_reason = f"reading stopped ({_reason(error)})"
            yield None  # flushes the decoder, as the last packet of a sound stream does


@contextmanager
def open_track(
    source: PathOrUrl,
    stream: int | None,
    timeouts_seconds: tuple[float, float] = _URL_TIMEOUTS_SECONDS,
    options: Mapping[str, str] | None = None,
) -> Iterator[Track]:
    """Open a source for as long as the block lasts.

    Args:
        source: path, URL, camera, or "-" for standard input.
        stream: which video stream, from 0; None takes the one that FFmpeg thinks best.
        timeouts_seconds: for a network: to connect, and to read on.
        options: of FFmpeg's demuxer, besides those of the source's address.

    Raises:
        VideoError: the source cannot be opened or holds no video.
        ConfigError: there is no such stream.
    """
    check_there(source)
    address = locate(source)
    # Standard input may be silent for as long as it likes, a file is never.
    patient = local_path(source) is not None or is_stdin(source)
    try:
        piped = StandardInput() if is_stdin(source) else None
        container = av.open(
            piped or address.url,
            mode="r",
            format=piped.format if piped else address.format,
            options={**address.options, **(options or {})},
            **_LENIENT,
            timeout=None if patient else timeouts_seconds,
        )
    except (FFmpegError, OSError) as error:
        raise explain(source, _reason(error)) from None
    with container:
        videos = _video_streams(container, source)
        video = _pick(container, videos, stream, source)
        # There is no context where FFmpeg has no decoder; older PyAV crashes when asked to decode then.
        if video.codec_context is None:
            raise nothing_decodes(source)
        yield Track(container, videos, video)


def _video_streams(container: InputContainer, source: PathOrUrl) -> list[VideoStream]:
    # FFmpeg reads any text file as "ANSI art"; nobody means that.
    if container.format.name == "tty":
        raise nothing_decodes(source)
    videos = [video for video in container.streams.video if not video.disposition & Disposition.attached_pic]
    if not videos:
        what = "only sound" if container.streams.audio else "no video stream"
        raise unusable(source, f"holds {what}", "choose a file with pictures")
    return videos


def _pick(container: InputContainer, videos: list[VideoStream], stream: int | None, source: PathOrUrl) -> VideoStream:
    if stream is None:
        best: Any = container.streams.best("video")
        return best if best in videos else videos[0]
    if 0 <= stream < len(videos):
        return videos[stream]
    raise ConfigError(
        f"stream is {stream}, but {display_name(source)} has {len(videos)} video stream(s)",
        f"use 0 to {len(videos) - 1}" if len(videos) > 1 else "use 0, or leave it out",
    )


def rgb(picture: VideoFrame) -> torch.Tensor:
    """Return upright pixels, [3, H, W] uint8."""
    stored: Any = picture.to_ndarray(format="rgb24")
    return torch.from_numpy(orientation(picture).upright(stored).transpose(2, 0, 1).copy())


def orientation(picture: VideoFrame) -> Orientation:
    """Return how a stored picture becomes an upright one."""
    return Orientation.from_matrix(picture.side_data.get("DISPLAYMATRIX"))


def _reason(error: FFmpegError | OSError) -> str:
    return (error.strerror or "unknown reason").lower()


@dataclass(slots=True)
class Damage:
    """Counts what a reader had to skip.

    Attributes:
        pieces: packets that did not decode, and frames that the decoder had to patch.
        stop_reason: why reading stopped before the end; empty if it did not.
    """

    pieces: int = 0
    stop_reason: str = ""

    def complaint(
        self, start_seconds: float, end_seconds: float, duration_seconds: float | None, frame_seconds: float
    ) -> str:
        """Return what to add to the video's name, once it has been read to its end; empty if all was well.

        Args:
            start_seconds: time of the first frame.
            end_seconds: end of the last frame that decoded.
            duration_seconds: length that the header promises; None if it promises nothing.
            frame_seconds: usual length of a frame.
        """
        # Headers round, and sound may outlast the pictures a little: only a real gap is worth a warning.
        tolerance = max(1.0, 4 * frame_seconds)
        short = duration_seconds is not None and end_seconds < start_seconds + duration_seconds - tolerance
        skipped = f"{self.pieces} damaged packets or frames were skipped or patched" if self.pieces else ""
        if not short and not self.stop_reason:
            return f": {skipped}" if skipped else ""
        promised = "" if duration_seconds is None else f" of {duration_seconds:.1f} s"
        causes = [self.stop_reason or "the rest is missing or damaged", skipped]
        return f" ends at {end_seconds - start_seconds:.1f} s{promised}: {'; '.join(filter(None, causes))}"
