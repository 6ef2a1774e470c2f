"""Reads a file or URL from its first frame to its last: what it is, how many frames, the frames themselves."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass

from statekv.errors import VideoError, VideoWarning
from statekv.video.address import PathOrUrl, display_name, local_path, nothing_decodes
from statekv.video.decode import Damage, every_picture, open_track, orientation, rgb
from statekv.video.frame import Frame
from statekv.video.prefetch import prefetch
from statekv.video.sampling import check_limits, count_kept


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
        finite: whether the source ends, also where its length in seconds is unknown.
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
    finite: bool


def probe(source: PathOrUrl, stream: int | None = None, max_pixels: int | None = None) -> VideoInfo:
    """Read the header and the first frame of a video, and all packets of a file whose header does not tell its length.

    Args:
        source: path or URL.
        stream: which video stream, from 0; None takes the one that FFmpeg thinks best.
        max_pixels: of a picture; None: no limit.

    Raises:
        VideoError: the source cannot be opened, holds no video that decodes, or larger pictures.
        ConfigError: there is no such stream.
    """
    with open_track(source, stream, max_pixels=max_pixels) as track:
        picture = next(track.pictures(Damage()), None)
        if picture is None:
            raise nothing_decodes(source)
        turn = orientation(picture)
        size = (picture.width, picture.height)
        width, height = size if turn.rotation_degrees % 180 == 0 else size[::-1]
        return VideoInfo(
            start_seconds=track.start_seconds,
            duration_seconds=_length(source, stream, max_pixels) or track.about_seconds,
            width=width,
            height=height,
            frame_rate=float(track.video.average_rate) if track.video.average_rate else None,
            num_frames=track.video.frames or None,
            codec=track.video.codec_context.name,
            rotation_degrees=turn.rotation_degrees,
            stream_index=track.videos.index(track.video),
            num_video_streams=len(track.videos),
            finite=track.finite,
        )


def read_frames(
    source: PathOrUrl,
    fps: float | None = None,
    max_frames: int | None = None,
    stream: int | None = None,
    ahead: int = 0,
    until_seconds: float | None = None,
    max_pixels: int | None = None,
    max_decoded: int | None = None,
) -> Generator[Frame, None, None]:
    """Yield the sampled frames of a video in presentation order; memory does not grow with its length.

    A video that is damaged or cut off is read as far as it goes, and one VideoWarning follows its last frame.

    Args:
        source: path or URL.
        fps, max_frames: what to keep, as in `Sampler`.
        stream: which video stream, from 0; None takes the one that FFmpeg thinks best.
        ahead: frames to decode ahead on a thread; 0 decodes when asked.
        until_seconds: presentation time at which the video ends, as if it had been cut there; None: whole.
        max_pixels: of a picture; None: no limit.
        max_decoded: frames that are decoded, also those that are not kept; None: no limit.

    Raises:
        VideoError: at the first frame, if the source cannot be opened or holds no video that decodes, or larger
            pictures; behind the last frame that may be decoded.
        ConfigError: a limit that is not positive; at the first frame, if there is no such stream.
    """
    check_limits(fps, max_frames)
    items = _read(source, fps, max_frames, stream, until_seconds, max_pixels, max_decoded)
    return _issue_warnings(prefetch(items, ahead) if ahead else items)


def count_frames(
    source: PathOrUrl,
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
    with open_track(source, stream) as track:
        stamps = list(track.times())
        times = [pts for pts, _ in stamps if until_seconds is None or pts < until_seconds]
        length = stamps[-1][0] + stamps[-1][1] - track.start_seconds if stamps else None
        return count_kept(track.sampler(fps, max_frames, until_seconds, track.duration_seconds or length), times)


def _read(
    source: PathOrUrl,
    fps: float | None,
    max_frames: int | None,
    stream: int | None,
    until_seconds: float | None,
    max_pixels: int | None,
    max_decoded: int | None,
) -> Generator[Frame | VideoWarning, None, None]:
    length = _length(source, stream, max_pixels) if max_frames is not None else None
    with open_track(source, stream, max_pixels=max_pixels) as track:
        sampler, clock, damage = track.sampler(fps, max_frames, until_seconds, length), track.clock(), Damage()
        for number, picture in enumerate(every_picture(track, source, stream, damage, max_pixels)):
            if number == max_decoded:
                rule = f"{display_name(source)} has more than {max_decoded:,} frames"
                raise VideoError(rule, "raise max_decoded, or cut it into parts")
            damage.pieces += picture.is_corrupt
            # PyAV before 15 does not tell a frame's duration.
            duration = track.seconds(getattr(picture, "duration", None))
            pts, duration = clock.tick(track.seconds(picture.pts), duration)
            if until_seconds is not None and pts >= until_seconds:
                return
            # Most frames are dropped here, before the costly conversion to RGB.
            if sampler.keep(pts):
                yield Frame(rgb(picture), pts, duration)
                if sampler.exhausted:
                    return
        if not clock.started:
            raise nothing_decodes(source)
        complaint = damage.complaint(
            track.start_seconds, clock.end_seconds, track.duration_seconds, track.frame_seconds
        )
        if complaint:
            yield VideoWarning(display_name(source) + complaint)


def _length(source: PathOrUrl, stream: int | None, max_pixels: int | None) -> float | None:
    """Seconds of a local file whose header does not tell, by its packets."""
    if local_path(source) is None:
        return None
    with open_track(source, stream, max_pixels=max_pixels) as track:
        if track.duration_seconds is not None:
            return None
        end = max((pts + duration for pts, duration in track.times()), default=track.start_seconds)
        return end - track.start_seconds if end > track.start_seconds else None


def _issue_warnings(items: Generator[Frame | VideoWarning, None, None]) -> Generator[Frame, None, None]:
    # Warnings travel among the frames and are issued here, on the consumer's thread: filters belong to the
    # whole process, so that a consumer inside catch_warnings would swallow those of another thread.
    with closing(items):
        for item in items:
            if isinstance(item, Frame):
                yield item
            else:
                warnings.warn(item, stacklevel=2)
