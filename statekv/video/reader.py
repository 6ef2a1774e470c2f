"""Opens a file or URL and yields its frames: the only door to FFmpeg for reading."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
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

from statekv.errors import ConfigError, VideoError, VideoWarning
from statekv.video.clock import Clock, parse_timestamp
from statekv.video.damage import Damage
from statekv.video.frame import Frame
from statekv.video.orientation import Orientation
from statekv.video.prefetch import prefetch
from statekv.video.sampling import Sampler, check_limits, count_kept
from statekv.video.source import Source, check_file, display_name, explain, local_path, nothing_decodes, unusable

_URL_TIMEOUT_SECONDS = (30.0, 60.0)  # to connect, to read on


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What one video stream says about itself.

    Attributes:
        start_seconds: time of the first frame on the stream's own clock.
        duration_seconds: length from there; None where the container does not say, as for a live stream.
        width, height: size in pixels of the upright picture.
        frame_rate: average frames per second; None where unknown.
        num_frames: number of frames by the header; None where it does not say.
        codec: FFmpeg's name of the decoder.
        rotation_degrees: counterclockwise turn that makes the stored picture upright: 0, 90, 180 or 270.
        stream_index: which of the video streams this is, as `stream=` takes it.
        num_video_streams: how many video streams there are; cover art does not count.
    """

    start_seconds: float
    duration_seconds: float | None
    width: int
    height: int
    frame_rate: float | None
    num_frames: int | None
    codec: str
    rotation_degrees: int
    stream_index: int
    num_video_streams: int


def probe(source: Source, stream: int | None = None) -> VideoInfo:
    """Read the header and the first frame of a video.

    Args:
        source: path or URL.
        stream: which video stream, from 0; None takes the one that FFmpeg thinks best.

    Raises:
        VideoError: the source cannot be opened or holds no video that decodes.
        ConfigError: there is no such stream.
    """
    with _open(source, stream) as track:
        picture = next(track.pictures(Damage()), None)
        if picture is None:
            raise nothing_decodes(source)
        orientation = _orientation(picture)
        size = (picture.width, picture.height)
        width, height = size if orientation.rotation_degrees % 180 == 0 else size[::-1]
        return VideoInfo(
            start_seconds=track.start_seconds,
            duration_seconds=track.duration_seconds,
            width=width,
            height=height,
            frame_rate=float(track.video.average_rate) if track.video.average_rate else None,
            num_frames=track.video.frames or None,
            codec=track.video.codec_context.name,
            rotation_degrees=orientation.rotation_degrees,
            stream_index=track.videos.index(track.video),
            num_video_streams=len(track.videos),
        )


def read_frames(
    source: Source,
    fps: float | None = None,
    max_frames: int | None = None,
    stream: int | None = None,
    ahead: int = 0,
    until_seconds: float | None = None,
) -> Generator[Frame, None, None]:
    """Yield the sampled frames of a video in presentation order; memory does not grow with its length.

    A video that is damaged or cut off is read as far as it goes, and one VideoWarning follows its last frame.

    Args:
        source: path or URL.
        fps, max_frames: what to keep, as in `Sampler`.
        stream: which video stream, from 0; None takes the one that FFmpeg thinks best.
        ahead: frames to decode ahead on a thread; 0 decodes when asked.
        until_seconds: presentation time at which the video ends, as if it had been cut there; None: whole.

    Raises:
        VideoError: at the first frame, if the source cannot be opened or holds no video that decodes.
        ConfigError: a limit that is not positive; at the first frame, if there is no such stream.
    """
    check_limits(fps, max_frames)
    items = _read(source, fps, max_frames, stream, until_seconds)
    return _issue_warnings(prefetch(items, ahead) if ahead else items)


def count_frames(
    source: Source,
    fps: float | None = None,
    max_frames: int | None = None,
    stream: int | None = None,
    until_seconds: float | None = None,
) -> int:
    """Count the frames that `read_frames` will yield for a local file, without decoding it.

    Exact for a sound file; in a damaged one, packets that will not decode are counted too.

    Raises:
        VideoError: as `read_frames`; also for a URL, which would be downloaded twice.
        ConfigError: as `read_frames`.
    """
    check_limits(fps, max_frames)
    if local_path(source) is None:
        raise VideoError(f"{display_name(source)} is not local: cannot count its frames", "download it")
    with _open(source, stream) as track:
        times = (pts for pts in track.packet_times() if until_seconds is None or pts < until_seconds)
        return count_kept(track.sampler(fps, max_frames, until_seconds), times)


def _read(
    source: Source, fps: float | None, max_frames: int | None, stream: int | None, until_seconds: float | None
) -> Generator[Frame | VideoWarning, None, None]:
    with _open(source, stream) as track:
        sampler, clock, damage = track.sampler(fps, max_frames, until_seconds), track.clock(), Damage()
        for picture in track.pictures(damage):
            damage.pieces += picture.is_corrupt
            # PyAV before 15 does not tell a frame's duration.
            duration = track.seconds(getattr(picture, "duration", None))
            pts, duration = clock.tick(track.seconds(picture.pts), duration)
            if until_seconds is not None and pts >= until_seconds:
                return
            # Most frames are dropped here, before the costly conversion to RGB.
            if sampler.keep(pts):
                yield Frame(_rgb(picture), pts, duration)
                if sampler.exhausted:
                    return
        if not clock.started:
            raise nothing_decodes(source)
        complaint = damage.complaint(
            track.start_seconds, clock.end_seconds, track.duration_seconds, track.frame_seconds
        )
        if complaint:
            yield VideoWarning(display_name(source) + complaint)


def _issue_warnings(items: Generator[Frame | VideoWarning, None, None]) -> Generator[Frame, None, None]:
    # Warnings travel among the frames and are issued here, on the consumer's thread: filters belong to the
    # whole process, so that a consumer inside catch_warnings would swallow those of another thread.
    with closing(items):
        for item in items:
            if isinstance(item, Frame):
                yield item
            else:
                warnings.warn(item, stacklevel=2)


@dataclass(frozen=True, slots=True)
class _Track:
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

    def pictures(self, damage: Damage) -> Iterator[VideoFrame]:
        """Decode in presentation order, noting on the way what would not decode."""
        self.video.thread_type = "AUTO"
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
def _open(source: Source, stream: int | None) -> Iterator[_Track]:
    path = local_path(source)
    if path is not None:
        check_file(path)
    # "file:" keeps FFmpeg from taking a colon in the name for a protocol.
    address = str(source) if path is None else f"file:{path}"
    timeout = _URL_TIMEOUT_SECONDS if path is None else None
    try:
        container = av.open(address, mode="r", metadata_errors="replace", timeout=timeout)
    except FFmpegError as error:
        raise explain(source, _reason(error)) from None
    with container:
        videos = _video_streams(container, source)
        video = _pick(container, videos, stream, source)
        # There is no context where FFmpeg has no decoder; older PyAV crashes when asked to decode then.
        if video.codec_context is None:
            raise nothing_decodes(source)
        yield _Track(container, videos, video)


def _video_streams(container: InputContainer, source: Source) -> list[VideoStream]:
    # FFmpeg reads any text file as "ANSI art"; nobody means that.
    if container.format.name == "tty":
        raise nothing_decodes(source)
    videos = [video for video in container.streams.video if not video.disposition & Disposition.attached_pic]
    if not videos:
        what = "only sound" if container.streams.audio else "no video stream"
        raise unusable(source, f"holds {what}", "choose a file with pictures")
    return videos


def _pick(container: InputContainer, videos: list[VideoStream], stream: int | None, source: Source) -> VideoStream:
    if stream is None:
        best: Any = container.streams.best("video")
        return best if best in videos else videos[0]
    if 0 <= stream < len(videos):
        return videos[stream]
    raise ConfigError(
        f"stream is {stream}, but {display_name(source)} has {len(videos)} video stream(s)",
        f"use 0 to {len(videos) - 1}" if len(videos) > 1 else "use 0, or leave it out",
    )


def _rgb(picture: VideoFrame) -> torch.Tensor:
    stored: Any = picture.to_ndarray(format="rgb24")
    return torch.from_numpy(_orientation(picture).upright(stored).transpose(2, 0, 1).copy())


def _orientation(picture: VideoFrame) -> Orientation:
    return Orientation.from_matrix(picture.side_data.get("DISPLAYMATRIX"))


def _reason(error: FFmpegError) -> str:
    return (error.strerror or "unknown reason").lower()
