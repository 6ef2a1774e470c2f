"""One video stream of an open container: the only door to FFmpeg for reading."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import av
import torch
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from statekv.errors import ConfigError, VideoError
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
    numbered,
    unusable,
)
from statekv.video.clock import Clock, parse_timestamp
from statekv.video.frame import Orientation
from statekv.video.sampling import Sampler

_UNSTAMPED = ("mjpeg", "mpjpeg", "h264", "hevc", "m4v", "image2pipe", "jpeg_pipe")
# Metadata that is not UTF-8 ends PyAV 18 unless it is told otherwise; 19 reads it, and knows no such argument.
_LENIENT: dict[str, Any] = {"metadata_errors": "replace"} if av.__version__.startswith("18.") else {}
_URL_TIMEOUTS_SECONDS = (10.0, 20.0)  # to connect, to read on
# Streams of these are joined by putting one behind another, so that their headers tell of a part, and those of FLV, ASF
# and MPEG-PS of sound that may outlast the pictures.
_LENGTH_UNSURE = ("mpegts", "mpeg", "flv", "asf")


# What is opened, by content, whatever a file is called: containers of pictures and sound. None of those that name other
# files or addresses (playlists, concat, image sequences, SDP), draw text, or make pictures up.
_FORMATS = (
    *("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "mpegts", "mpeg", "mpegvideo", "flv", "live_flv", "asf"),
    *("ogg", "nut", "mxf", "gxf", "dv", "rm", "ivf", "obu", "h261", "h263", "h264", "hevc", "vvc", "m4v", "vc1"),
    *("mjpeg", "mpjpeg", "gif", "apng", "yuv4mpegpipe", "wtv", "smjpeg", "mjpeg_2000"),
    *(f"{kind}_pipe" for kind in ("png", "jpeg", "webp", "bmp", "tiff", "gif", "j2k", "ppm", "pgm", "jpegxl")),
    *("mp3", "wav", "flac", "aac", "amr", "aiff", "w64"),  # to say that they hold only sound
)
_FORMATS_OF_NETWORKS = ("hls", "rtsp", "rtp", "sdp", "mpegtsraw", "webvtt")
# What decodes them; FFmpeg has some 300 decoders more, few of which anybody looks after.
_CODECS = (
    *("h264", "hevc", "vvc", "av1", "libdav1d", "libaom-av1", "vp8", "vp9", "libvpx", "libvpx-vp9", "vp6", "vp6f"),
    *("mpeg1video", "mpeg2video", "mpegvideo", "mpeg4", "msmpeg4v1", "msmpeg4v2", "msmpeg4", "h261", "h263", "h263p"),
    *("flv", "wmv1", "wmv2", "wmv3", "vc1", "theora", "mjpeg", "mjpegb", "jpegls", "jpeg2000", "libopenjpeg"),
    *("png", "apng", "gif", "bmp", "tiff", "webp", "ppm", "pgm", "libjxl", "prores", "dnxhd", "ffv1", "ffvhuff"),
    *("huffyuv", "utvideo", "magicyuv", "rawvideo", "v210", "dvvideo", "svq1", "svq3", "cinepak", "rv30", "rv40"),
    *("qtrle", "rpza", "msvideo1", "cfhd", "wrapped_avframe", "msmpeg4v3", "mss2"),
)


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
        """Length of the video stream as the header tells it; None where it does not, or may tell another one's."""
        if self.container.format.name in _LENGTH_UNSURE:
            return None
        if self.video.duration:
            return self.seconds(self.video.duration)
        # Matroska tells each stream's length in a tag, and counts it from time zero.
        seconds = parse_timestamp(self.video.metadata.get("DURATION", ""))
        if seconds is None:
            if len(self.container.streams) > len(self.videos):
                return None
            seconds = (self.container.duration or 0) / av.time_base
        if "matroska" in self.container.format.name:
            seconds -= self.start_seconds
        return seconds if seconds > 0 else None

    @property
    def about_seconds(self) -> float | None:
        """Length of the whole container, where nothing better is known."""
        return self.duration_seconds or (self.container.duration or 0) / av.time_base or None

    @property
    def finite(self) -> bool:
        """Whether the source ends: it tells its length in time, or in bytes that are no playlist's."""
        endless = ("hls", "dash", "rtsp", "sdp", "mpjpeg")
        return self.about_seconds is not None or (self.container.size > 0 and self.container.format.name not in endless)

    @property
    def frame_seconds(self) -> float:
        return float(1 / self.video.average_rate) if self.video.average_rate else 0.0

    def seconds(self, ticks: int | None) -> float | None:
        return None if ticks is None or self.video.time_base is None else float(ticks * self.video.time_base)

    def sampler(
        self,
        fps: float | None,
        max_frames: int | None,
        until_seconds: float | None,
        duration_seconds: float | None = None,
    ) -> Sampler:
        """Of this stream; its length where that is known better than from the header."""
        ends = (duration_seconds or self.about_seconds, until_seconds and until_seconds - self.start_seconds)
        return Sampler(fps, max_frames, self.start_seconds, min((end for end in ends if end), default=None))

    def clock(self) -> Clock:
        return Clock(self.start_seconds, self.frame_seconds)

    @property
    def stamped(self) -> bool:
        """False where frames bear no times of their own, and FFmpeg makes some up from a frame rate."""
        return self.container.format.name not in _UNSTAMPED

    def pictures(self, damage: Damage, at_once: bool = False, whole: bool = False) -> Iterator[VideoFrame]:
        """Decode in presentation order, noting on the way what would not decode.

        Args:
            at_once: hand out each picture as soon as it is there, at the price of decoding several at a time.
            whole: end at the first packet behind a picture that does not decode, with `damage.torn`: pictures that are
                decoded at a time with it are lost.
        """
        self.video.thread_type = "SLICE" if at_once else "AUTO"
        order = self._order()
        for packet in self._packets(damage):
            order.send(packet)
            try:
                pictures = self.video.decode(packet)
            except FFmpegError:
                if whole and order.given:
                    damage.torn = True
                    return
                damage.pieces += 1
                order.lose()
                continue
            yield from map(order.stamped, pictures)
        damage.torn = whole and order.owes

    def times(self) -> Iterator[tuple[float, float]]:
        """Time and duration of each picture that decodes, in presentation order, by the packets alone."""
        clock = self.clock()
        for run in self._runs():
            for pts, duration in run:
                yield clock.tick(pts, duration)

    def _runs(self) -> Iterator[list[tuple[float | None, float | None]]]:
        """Stamps and durations of the pictures of each stretch whose clock does not begin anew, sorted."""
        run: list[tuple[float | None, float | None]] = []
        order, key_pts, last = self._order(), None, None
        for packet in self._packets(Damage()):
            if packet is None or not packet.size or not order.send(packet):
                continue
            ticks = packet.dts if order.by_decoding else packet.pts
            if packet.is_keyframe:
                if last is not None and packet.dts is not None and packet.dts < last:
                    yield _sorted(run)
                    run = []
                key_pts = ticks if key_pts is None else key_pts
            last = packet.dts
            # Pictures in front of the first key picture need others, which are not there.
            leading = order.keys == 1 and ticks is not None and key_pts is not None and ticks < key_pts
            if not leading and not packet.is_discard:
                run.append((self.seconds(ticks), self.seconds(packet.duration)))
        yield _sorted(run)

    def _order(self) -> _Order:
        return _Order(self.container.format.name == "avi")  # for which FFmpeg makes presentation stamps up

    def _packets(self, damage: Damage) -> Iterator[Packet[VideoStream] | None]:
        try:
            yield from self.container.demux(self.video)
        except FFmpegError as error:
            damage.stop_reason = f"reading stopped ({_reason(error)})"
            yield None  # flushes the decoder, as the last packet of a sound stream does


class _Order:
    """Which stamp a picture has, in containers (AVI) that only tell when packets are decoded.

    Pictures are shown in the order of the times at which packets are decoded, the first at the first of those times.

    Args:
        by_decoding: whether the container is known as such a one; else its first key picture tells.

    Attributes:
        by_decoding: whether it is.
        keys: packets with key pictures so far.
        given: pictures so far.
    """

    def __init__(self, by_decoding: bool) -> None:
        self.by_decoding, self.keys, self.given = by_decoding, 0, 0
        self._sent = self._shown = -1  # latest stamps
        self._waiting: deque[int] = deque()

    def send(self, packet: Packet[VideoStream] | None) -> bool:
        """Take note of the next packet; whether a key picture has been among them."""
        if packet is None or not packet.size:
            return self.keys > 0
        if packet.is_keyframe:
            if not self.keys and packet.pts is None and packet.dts is not None:
                self.by_decoding = True
            self.keys += 1
        if self.by_decoding and packet.dts is not None:
            self._waiting.append(packet.dts)
        if self.keys and packet.pts is not None:
            self._sent = max(self._sent, packet.pts)
        return self.keys > 0

    @property
    def owes(self) -> bool:
        """Whether the last picture has not come out."""
        return 0 <= self._shown < self._sent and not self.by_decoding

    def lose(self) -> None:
        """The newest packet has not been decoded."""
        if self._waiting:
            self._waiting.pop()

    def stamped(self, picture: VideoFrame) -> VideoFrame:
        """The decoder's next picture with its stamp."""
        self.given += 1
        if picture.pts is not None:
            self._shown = max(self._shown, picture.pts)
        if self.by_decoding and self._waiting:
            picture.pts = self._waiting.popleft()
        return picture


def _sorted(run: list[tuple[float | None, float | None]]) -> list[tuple[float | None, float | None]]:
    """By their stamps, where all have one."""
    return run if any(pts is None for pts, _ in run) else sorted(run, key=lambda each: each[0] or 0.0)


@contextmanager
def open_track(
    source: PathOrUrl,
    stream: int | None,
    timeouts_seconds: tuple[float, float] = _URL_TIMEOUTS_SECONDS,
    options: Mapping[str, str] | None = None,
    max_pixels: int | None = None,
) -> Iterator[Track]:
    """Open a source for as long as the block lasts.

    Args:
        source: path, URL, camera, or "-" for standard input.
        stream: which video stream, from 0; None takes the one that FFmpeg thinks best.
        timeouts_seconds: for a network: to connect, and to read on.
        options: of FFmpeg's demuxer, besides those of the source's address.
        max_pixels: of a picture; None: no limit.

    Raises:
        VideoError: the source cannot be opened or holds no video, or one of a kind or size that is not read.
        ConfigError: there is no such stream.
    """
    check_there(source)
    address = locate(source)
    # Standard input may be silent for as long as it likes, a file is never.
    patient = local_path(source) is not None or is_stdin(source)
    formats = _FORMATS if patient else (*_FORMATS, *_FORMATS_OF_NETWORKS)
    allowed = {"format_whitelist": ",".join(formats)} if address.format is None else {}
    limit = {} if max_pixels is None else {"max_pixels": str(max_pixels)}
    try:
        piped = StandardInput() if is_stdin(source) else numbered(source)
        how: dict[str, Any] = {
            "format": piped.format if piped else address.format,
            "options": {**allowed, **address.options, **(options or {})},
            "timeout": None if patient else timeouts_seconds,
            **_LENIENT,
        }
        container = _opened(piped or address.url, limit if local_path(source) is not None else {}, how)
    except (FFmpegError, OSError) as error:
        raise explain(source, _reason(error)) from None
    with container:
        videos = _video_streams(container, source)
        video = _pick(container, videos, stream, source)
        # There is no context where FFmpeg has no decoder; older PyAV crashes when asked to decode then.
        if video.codec_context is None:
            raise nothing_decodes(source)
        _check_pictures(container, video, source, max_pixels)
        if limit:
            video.codec_context.options = {**video.codec_context.options, **limit}
        yield Track(container, videos, video)


def every_picture(
    track: Track, source: PathOrUrl, stream: int | None, damage: Damage, max_pixels: int | None
) -> Iterator[VideoFrame]:
    """All pictures of an open track that decode. Where one does not, a file is read again, without threads.

    Pictures that are decoded at a time with a damaged one, on other threads, are lost with it.
    """
    given = 0
    for picture in track.pictures(damage, whole=local_path(source) is not None):
        given += 1
        yield picture
    if damage.torn:
        damage.pieces, damage.stop_reason = 0, ""
        with open_track(source, stream, max_pixels=max_pixels) as again:
            for number, picture in enumerate(again.pictures(damage, at_once=True)):
                if number >= given:
                    yield picture
                else:
                    damage.pieces += picture.is_corrupt


def _opened(file: Any, limit: Mapping[str, str], how: Mapping[str, Any]) -> InputContainer:
    """Open a file, within a limit also where FFmpeg decodes the picture of a still to know what it is."""
    opening: Any = av.open
    if limit:
        try:
            return cast(InputContainer, opening(file, mode="r", stream_options=[dict(limit)], **how))
        except ValueError:  # a container whose streams are not known yet, and which tells sizes by itself
            if not isinstance(file, str):
                file.seek(0)
    return cast(InputContainer, opening(file, mode="r", **how))


def _check_pictures(container: InputContainer, video: VideoStream, source: PathOrUrl, max_pixels: int | None) -> None:
    """Raise a VideoError for a codec that is not read, or for pictures that are too large, before one is decoded."""
    context = video.codec_context
    name = context.codec.name
    if name not in _CODECS:
        rule = f"{display_name(source)} holds pictures of the codec {name}, which is not read"
        raise VideoError(rule, "convert it, as with: ffmpeg -i FILE -c:v libx264 FILE.mp4")
    if max_pixels is not None and context.width * context.height > max_pixels:
        size = f"{context.width}x{context.height}"
        rule = f"{display_name(source)} has pictures of {size}, {context.width * context.height:,} pixels"
        raise VideoError(rule, f"at most {max_pixels:,} are decoded: raise max_pixels, or make them smaller")
    if max_pixels is not None and not context.width and container.format.name.endswith("_pipe"):
        rule = f"{display_name(source)} has pictures whose size cannot be read, or of more than {max_pixels:,} pixels"
        raise VideoError(rule, "check that it plays elsewhere, raise max_pixels, or make them smaller")


def _video_streams(container: InputContainer, source: PathOrUrl) -> list[VideoStream]:
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
    rule = f"stream is {stream}, but {display_name(source)} has {len(videos)} video stream(s)"
    raise ConfigError(rule, f"use 0 to {len(videos) - 1}" if len(videos) > 1 else "use 0, or leave it out")


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
        torn: whether a picture behind the first one did not decode.
    """

    pieces: int = 0
    stop_reason: str = ""
    torn: bool = False

    def complaint(
        self, start_seconds: float, end_seconds: float, duration_seconds: float | None, frame_seconds: float
    ) -> str:
        """What to add to the video's name, once it has been read from `start_seconds` to `end_seconds`, of the length
        that the header promises (None: nothing); empty if all was well.
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
