"""All frames of a file in order, with the times that the file gives them."""

import contextlib
import os
import threading
import warnings
import weakref
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from statekv.errors import ConfigError, VideoError
from statekv.video.decode import rgb
from statekv.video.file import VideoInfo, count_frames, probe, read_frames
from statekv.video.sampling import Sampler
from tests.video.fixtures.clips import (
    REAL,
    SIZE,
    closest_index,
    cut_start,
    grey,
    needs_real,
    noise,
    quarters,
    set_matrix,
    write_clip,
    write_still,
    write_two_streams,
)

pytestmark = pytest.mark.filterwarnings("error::statekv.errors.VideoWarning")


def times(frames):
    return [frame.pts_seconds for frame in frames]


def near(values):
    return pytest.approx(values, abs=1e-6)


@pytest.fixture
def clip(tmp_path):
    return write_clip(tmp_path / "clip.mp4", range(30))


def test_probe(clip):
    assert probe(clip) == VideoInfo(
        start_seconds=0.0,
        duration_seconds=1.2,
        width=64,
        height=48,
        frame_rate=25.0,
        num_frames=30,
        codec="h264",
        rotation_degrees=0,
        stream_index=0,
        num_video_streams=1,
        finite=True,
    )


@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_all_frames_in_presentation_order(clip, ahead):
    frames = list(read_frames(clip, ahead=ahead))
    assert [closest_index(frame.data, 30) for frame in frames] == list(range(30))
    assert times(frames) == near([i / 25 for i in range(30)])
    assert [frame.duration_seconds for frame in frames] == near([1 / 25] * 30)
    assert frames[0].data.shape == (3, 48, 64)
    assert frames[0].data.is_contiguous()


def test_variable_rate_keeps_its_times(tmp_path):
    ticks = [0, 1, 2, 10, 11, 40, 41, 90]
    path = write_clip(tmp_path / "clip.mp4", ticks, Fraction(1, 30))
    assert times(read_frames(path)) == near([tick / 30 for tick in ticks])
    assert times(read_frames(path, fps=1)) == near([0, 40 / 30, 3])


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_a_start_after_zero_is_kept(tmp_path, suffix):
    path = write_clip(tmp_path / f"clip{suffix}", range(125, 155), options={"bf": "0"})
    info, all_times = probe(path), times(read_frames(path))
    assert info.start_seconds == near(all_times[0])
    # MPEG-TS writers may shift all times to leave room for their buffers.
    assert all_times[0] == pytest.approx(5, abs=2 if suffix == ".ts" else 1e-3)
    assert info.duration_seconds == pytest.approx(1.2, abs=1e-3)
    assert times(read_frames(path, fps=5)) == near(all_times[::5])


def test_frames_without_stamps_are_given_times(tmp_path):
    path = write_clip(tmp_path / "clip.264", range(30), format="h264")
    with av.open(str(path)) as container:
        assert all(packet.pts is None for packet in container.demux())
    assert probe(path).duration_seconds == pytest.approx(1.2)
    assert times(read_frames(path)) == near([i / 25 for i in range(30)])
    assert times(read_frames(path, max_frames=3)) == near([0, 0.4, 0.8])
    assert count_frames(path, max_frames=3) == 3


@pytest.mark.parametrize(("codec", "suffix"), [("libx264", ".mkv"), ("libvpx", ".webm")])
def test_the_length_of_a_live_recording_is_that_of_its_packets(tmp_path, codec, suffix):
    path = write_clip(tmp_path / f"clip{suffix}", range(30), codec=codec, muxer={"live": "1"})
    info = probe(path)
    assert info.num_frames is None
    assert info.duration_seconds == pytest.approx(1.2, abs=2e-3)
    assert times(read_frames(path)) == near([i / 25 for i in range(30)])
    assert times(read_frames(path, max_frames=4)) == near([0, 0.32, 0.6, 0.92])
    assert count_frames(path, max_frames=4) == 4


B_FRAMES = {"g": "12", "bf": "3", "b_strategy": "0"}


def test_an_avi_with_reordered_pictures_has_their_times(tmp_path):
    path = write_clip(tmp_path / "clip.avi", range(36), options=B_FRAMES)
    frames = list(read_frames(path))
    assert [closest_index(frame.data, 37) for frame in frames] == list(range(36))
    assert times(frames) == near([i / 25 for i in range(36)])
    assert len(list(read_frames(path, fps=25))) == count_frames(path, fps=25) == 36


@pytest.mark.parametrize("suffix", [".ts", ".mpg"])
def test_joined_streams_are_as_long_as_all_of_them(tmp_path, suffix):
    codec = "libx264" if suffix == ".ts" else "mpeg2video"
    part = write_clip(tmp_path / f"part{suffix}", range(36), codec=codec, options=B_FRAMES)
    path = tmp_path / f"clip{suffix}"
    path.write_bytes(3 * part.read_bytes())
    whole = times(read_frames(path))
    assert len(whole) == count_frames(path) == 108
    assert probe(path).duration_seconds == pytest.approx(108 / 25, abs=0.1)
    spread = times(read_frames(path, max_frames=9))
    assert len(spread) == count_frames(path, max_frames=9) == 9
    assert spread[-1] - spread[0] > 3.5
    assert len(list(read_frames(path, fps=5))) == count_frames(path, fps=5)


def test_what_comes_before_the_first_key_picture_is_not_counted(tmp_path):
    options = {**B_FRAMES, "x264-params": "open-gop=1"}
    whole = write_clip(tmp_path / "whole.ts", range(60), options=options)
    with av.open(str(whole)) as container:
        keys = [packet.pos or 0 for packet in container.demux(video=0) if packet.is_keyframe]
    path = tmp_path / "clip.ts"
    path.write_bytes(whole.read_bytes()[keys[1] - 188 * 12 :])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert 30 < len(list(read_frames(path))) == count_frames(path) < 60


def test_a_picture_with_longer_sound_is_spread_over_itself(tmp_path):
    path = write_clip(tmp_path / "clip.flv", range(50), sound_seconds=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = times(read_frames(path, max_frames=5))
    assert [pts - found[0] for pts in found] == near([0, 0.4, 0.8, 1.2, 1.6])
    assert count_frames(path, max_frames=5) == 5


@pytest.mark.parametrize("share", [0.4, 0.6, 0.85])
def test_of_a_file_that_is_cut_everything_is_read_that_decodes(tmp_path, share):
    faststart = {"movflags": "+faststart"}
    whole = write_clip(tmp_path / "whole.mp4", range(60), pictures=[*noise(60)], muxer=faststart, options=B_FRAMES)
    data = whole.read_bytes()
    path = tmp_path / "clip.mp4"
    path.write_bytes(data[: int(share * len(data))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = len(list(read_frames(path)))
    assert found == decoded_alone(path) > 10


def decoded_alone(path):
    """Pictures that come out of a decoder without threads."""
    found = 0
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        for packet in container.demux(stream):
            with contextlib.suppress(av.FFmpegError):
                found += len(stream.decode(packet))
    return found


@pytest.mark.parametrize("text", ["#EXTM3U\n#EXTINF:2,\nfile://{}\n", "ffconcat version 1.0\nfile {}\n", "v=0\n"])
@pytest.mark.parametrize("name", ["list.mp4", "list.m3u8", "list.txt"])
def test_lists_of_other_files_are_not_read(tmp_path, text, name):
    other = write_clip(tmp_path / "other.ts", range(10))
    (tmp_path / name).write_text(text.format(other))
    with pytest.raises(VideoError, match="which is not read from disk"):
        probe(tmp_path / name)


def test_a_name_that_is_a_pattern_is_a_name(tmp_path):
    write_still(tmp_path / "clip1.png", 10)
    found = write_still(tmp_path / "some.png", 20)
    found.rename(tmp_path / "clip%d.png")
    assert [closest_index(frame.data, 37) for frame in read_frames(tmp_path / "clip%d.png")] == [20]


def test_a_file_of_another_machine_is_not_one_of_ours(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", range(4))
    assert probe(f"file://localhost{path}").num_frames == probe(f"file://{path}").num_frames == 4
    with pytest.raises(VideoError, match="a file on the machine 'elsewhere'"):
        probe(f"file://elsewhere{path}")


def test_large_pictures_are_refused_before_they_are_decoded(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", range(4))  # 64x48
    assert probe(clip, max_pixels=64 * 48).width == 64
    with pytest.raises(VideoError, match=r"64x48, 3,072 pixels .*at most 3,071"):
        probe(clip, max_pixels=64 * 48 - 1)
    still = write_still(tmp_path / "some.png", 20)
    with pytest.raises(VideoError, match="more than 3,071 pixels"):
        next(read_frames(still, max_frames=2, max_pixels=64 * 48 - 1))


def test_a_file_may_have_as_many_frames_as_may_be_decoded(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", range(20))
    assert len(list(read_frames(clip, fps=5, max_decoded=20))) == 4
    frames = read_frames(clip, fps=5, max_decoded=19)
    assert [next(frames).pts_seconds for _ in range(4)] == near([0, 0.2, 0.4, 0.6])
    with pytest.raises(VideoError, match="more than 19 frames"):
        next(frames)


def test_codecs_that_nobody_looks_after_are_not_decoded(tmp_path):
    clip = write_clip(tmp_path / "clip.avi", range(4), codec="zmbv", pix_fmt="bgr0")
    with pytest.raises(VideoError, match="codec zmbv, which is not read"):
        next(read_frames(clip))


def test_an_animated_webp_is_named(tmp_path):
    path = tmp_path / "clip.webp"
    header = b"RIFF\x24\x00\x00\x00WEBPVP8X\x0a\x00\x00\x00\x02" + bytes(9)
    path.write_bytes(header + b"ANIM\x06\x00\x00\x00" + bytes(6))
    with pytest.raises(VideoError, match="an animated WebP"):
        next(read_frames(path))


def test_a_named_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.ts")
    with pytest.raises(VideoError, match=r"a named pipe, .*standard input"):
        probe(tmp_path / "pipe.ts")


def test_a_fragmented_mp4_is_whole(tmp_path):
    path = write_clip(
        tmp_path / "clip.mp4",
        range(100),
        muxer={"movflags": "frag_keyframe+empty_moov"},
        options={"g": "10", "bf": "0"},
    )
    assert probe(path).duration_seconds in (None, pytest.approx(4))
    assert times(read_frames(path)) == near([i / 25 for i in range(100)])


def test_sound_that_outlasts_the_pictures_is_no_damage(tmp_path):
    for suffix in (".mp4", ".mkv"):
        path = write_clip(tmp_path / f"clip{suffix}", range(25), sound_seconds=4)
        assert probe(path).duration_seconds == pytest.approx(1, abs=1e-3)
        assert len(list(read_frames(path))) == 25


def test_several_video_streams(tmp_path):
    path = write_two_streams(tmp_path / "clip.mp4")
    red, blue = (next(read_frames(path, stream=n)).data.float().mean(dim=(1, 2)) for n in (0, 1))
    assert red.argmax() == 0
    assert blue.argmax() == 2
    assert [count_frames(path, stream=n) for n in (0, 1)] == [10, 20]
    assert [probe(path, stream=n).stream_index for n in (0, 1)] == [0, 1]
    assert [probe(path, stream=n).width for n in (0, 1)] == [32, 64]
    assert probe(path).num_video_streams == 2


@pytest.mark.parametrize("stream", [2, -1])
@pytest.mark.parametrize("read", [probe, count_frames, lambda *args, **kw: next(read_frames(*args, **kw))])
def test_a_missing_stream_is_named(tmp_path, stream, read):
    path = write_two_streams(tmp_path / "clip.mp4")
    with pytest.raises(ConfigError, match=f"stream is {stream}, but clip.mp4 has 2 video"):
        read(path, stream=stream)


@pytest.mark.parametrize("pix_fmt", ["yuv420p10le", "yuv444p", "yuv422p10le", "yuvj420p"])
def test_other_pixel_formats(tmp_path, pix_fmt):
    path = write_clip(tmp_path / "clip.mp4", range(10), pix_fmt=pix_fmt)
    frames = list(read_frames(path))
    assert {frame.data.dtype for frame in frames} == {torch.uint8}
    assert [closest_index(frame.data, 10) for frame in frames] == list(range(10))


@pytest.mark.skipif(int(av.__version__.split(".")[0]) < 17, reason="older PyAV takes BT.601 for every stream")
def test_hd_colours_use_their_own_matrix(tmp_path):
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = (*SIZE, "yuv420p")
        stream.codec_context.colorspace, stream.codec_context.color_range = 1, 1
        # BT.709, limited range: Y, Cb, Cr of pure green.
        planes = np.full((SIZE[1] * 3 // 2, SIZE[0]), 173, np.uint8)
        planes[SIZE[1] : SIZE[1] * 5 // 4], planes[SIZE[1] * 5 // 4 :] = 42, 26
        container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuv420p")))
        container.mux(stream.encode(None))
    colour = next(read_frames(path)).data.float().mean(dim=(1, 2)).tolist()
    assert colour == pytest.approx([0, 255, 0], abs=4)


# A camera held upright writes (0, 1, -1, 0): stored right is shown at the bottom, a clockwise turn.
@pytest.mark.parametrize(
    ("matrix", "turn", "degrees"),
    [
        ((0, 1, -1, 0), lambda pixels: np.rot90(pixels, -1), 270),
        ((-1, 0, 0, -1), lambda pixels: np.rot90(pixels, 2), 180),
        ((0, -1, 1, 0), lambda pixels: np.rot90(pixels, 1), 90),
        ((-1, 0, 0, 1), lambda pixels: pixels[:, ::-1], 180),
    ],
)
def test_pictures_are_turned_upright(tmp_path, matrix, turn, degrees):
    path = write_clip(tmp_path / "clip.mp4", range(3), pictures=[quarters()] * 3)
    set_matrix(path, *matrix)
    expected = torch.from_numpy(turn(quarters()).transpose(2, 0, 1).copy())
    info = probe(path)
    assert info.rotation_degrees == degrees
    for frame in read_frames(path):
        assert frame.data.shape == expected.shape == (3, info.height, info.width)
        assert (frame.data.float() - expected.float()).abs().mean() < 6


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.ts", "clip.264", "clip.avi", "clip.webm"])
def test_count_equals_reading_equals_online(tmp_path, name):
    codec = {"clip.avi": "mpeg4", "clip.webm": "libvpx"}.get(name, "libx264")
    path = write_clip(tmp_path / name, range(7, 67), codec=codec)
    info, everything = probe(path), times(read_frames(path))
    assert len(everything) == 60
    for limits in ({}, {"fps": 7.3}, {"fps": 5}, {"max_frames": 7}, {"fps": 10, "max_frames": 3}):
        online = Sampler(**limits, start_seconds=info.start_seconds, duration_seconds=info.duration_seconds)
        kept = [time for time in everything if online.keep(time)]
        assert times(read_frames(path, **limits)) == kept
        assert count_frames(path, **limits) == len(kept) <= limits.get("max_frames", 60)


def test_frames_before_an_edit_are_neither_shown_nor_counted(tmp_path):
    path = cut_start(write_clip(tmp_path / "clip.mp4", range(60), options={"g": "30"}), ticks=10 * 512)
    frames = list(read_frames(path))
    assert [closest_index(frame.data, 37) for frame in frames[:5]] == [10, 11, 12, 13, 14]
    assert len(frames) == count_frames(path) == 50
    assert len(list(read_frames(path, fps=5))) == count_frames(path, fps=5) == 10


def test_dropped_frames_are_never_converted(clip, monkeypatch):
    from statekv.video import file

    converted = []
    original = rgb

    def counted(picture):
        converted.append(picture.pts)
        return original(picture)

    monkeypatch.setattr(file, "rgb", counted)
    assert len(list(read_frames(clip, fps=5))) == len(converted) == 6


@pytest.mark.parametrize("ahead", [0, 2])
def test_a_thread_decodes_only_if_asked_to(clip, ahead):
    stream = read_frames(clip, ahead=ahead)
    next(stream)
    names = [thread.name for thread in threading.enumerate()]
    stream.close()
    assert ("statekv-prefetch" in names) == (ahead > 0)


@pytest.mark.parametrize("ahead", [0, 3])
def test_memory_is_flat(tmp_path, ahead):
    path = write_clip(tmp_path / "clip.mp4", range(200))
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = count = 0
    for frame in read_frames(path, ahead=ahead):
        alive.add(frame.data)
        count += 1
        del frame
        most = max(most, len(alive))
    assert count == 200
    assert most <= ahead + 1


@pytest.mark.parametrize("ahead", [0, 2])
def test_abandoning_closes_the_file(clip, ahead, monkeypatch):
    opened, closed = [], []
    original = av.open

    class Remembered:
        def __init__(self, *args, **kwargs):
            self.container = original(*args, **kwargs)
            opened.append(self)

        def __getattr__(self, name):
            return getattr(self.container, name)

        def __enter__(self):
            return self

        def __exit__(self, *reason):
            closed.append(self)
            self.container.close()

    monkeypatch.setattr(av, "open", Remembered)
    stream = read_frames(clip, ahead=ahead)
    next(stream)
    stream.close()
    for _ in read_frames(clip, ahead=ahead):
        break

    def consume():
        for _ in read_frames(clip, ahead=ahead):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consume()
    assert len(opened) == 3
    assert closed == opened


def test_a_full_sampler_stops_reading(clip):
    stream = read_frames(clip, max_frames=1)
    next(stream)
    with pytest.raises(StopIteration):
        next(stream)


@pytest.mark.parametrize("first", [0, 125])
@pytest.mark.parametrize("limits", [{}, {"fps": 3.0}, {"max_frames": 4}, {"fps": 5.0, "max_frames": 100}])
def test_until_a_time_it_is_the_video_cut_there(tmp_path, limits, first):
    long = write_clip(tmp_path / "long.mkv", range(first, first + 30))
    short = write_clip(tmp_path / "short.mkv", range(first, first + 17))
    end = (first + 16.9) / 25
    assert times(read_frames(long, until_seconds=end, **limits)) == near(times(read_frames(short, **limits)))
    assert count_frames(long, until_seconds=end, **limits) == count_frames(short, **limits)
    assert times(read_frames(long, until_seconds=99.0, **limits)) == near(times(read_frames(long, **limits)))


def test_wrong_limits_fail_before_the_first_frame(clip):
    with pytest.raises(ConfigError, match="fps is 0"):
        read_frames(clip, fps=0)
    with pytest.raises(ConfigError, match="max_frames is 0"):
        read_frames(clip, max_frames=0)


def test_names_with_colons_and_percents(tmp_path):
    path = write_clip(tmp_path / "plain.mp4", range(3)).rename(tmp_path / "part 1: 50%d é.mp4")
    assert len(list(read_frames(path))) == len(list(read_frames(str(path)))) == 3


def test_pictures_of_grey_are_told_apart():
    pictures = [torch.from_numpy(grey(index).transpose(2, 0, 1)) for index in range(30)]
    assert [closest_index(picture, 30) for picture in pictures] == list(range(30))


@needs_real
@pytest.mark.parametrize(
    ("stream", "size", "rate", "count"), [(0, (320, 180), 25, 325), (1, (480, 270), 30000 / 1001, 390)]
)
def test_real_two_streams(stream, size, rate, count):
    path = REAL / "nasa_13013.mp4"
    info = probe(path, stream=stream)
    assert (info.width, info.height, info.num_frames, info.num_video_streams) == (*size, count, 2)
    assert info.frame_rate == pytest.approx(rate)
    assert info.duration_seconds == pytest.approx(13, abs=0.02)
    for fps, expected in ((None, count), (rate, count), (5, 65), (1, 13)):
        assert count_frames(path, fps, stream=stream) == expected
    kept = times(read_frames(path, fps=1, stream=stream))
    assert kept == pytest.approx(list(range(13)), abs=1 / rate)
    assert probe(path).stream_index == 1


@needs_real
def test_real_non_zero_start():
    path = REAL / "test_non_zero_start.mp4"
    info, frames = probe(path), list(read_frames(path))
    assert info.start_seconds == frames[0].pts_seconds == pytest.approx(8.333, abs=1e-3)
    assert len(frames) == count_frames(path) == 12
    assert times(read_frames(path, fps=10)) == near(times(frames)[::3])


@needs_real
def test_real_rotation():
    # The clip holds the first pictures of the other one, with a matrix that asks for a quarter turn left.
    turned, plain = REAL / "nasa_13013_rotated.mp4", REAL / "nasa_13013.mp4"
    info = probe(turned)
    assert (info.width, info.height, info.rotation_degrees) == (270, 480, 90)
    first, reference = next(read_frames(turned)), next(read_frames(plain, stream=1))
    assert torch.equal(first.data, torch.rot90(reference.data, 1, dims=(1, 2)))
