"""What is written can be read back, and is whole or not there."""

import weakref
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from statekv.errors import ConfigError, VideoError
from statekv.video.file import probe, read_frames
from statekv.video.writer import write_video
from tests.video.fixtures.clips import closest_index, grey, quarters


def greys(count, size=(64, 48)):
    return (grey(index, size).transpose(2, 0, 1) for index in range(count))


def test_round_trip(tmp_path):
    path = tmp_path / "clip.mp4"
    write_video(path, greys(30), Fraction(30000, 1001))
    frames = list(read_frames(path))
    assert [closest_index(frame.data, 30) for frame in frames] == list(range(30))
    assert [frame.pts_seconds for frame in frames] == pytest.approx([i * 1001 / 30000 for i in range(30)])
    info = probe(path)
    assert (info.codec, info.width, info.height, info.num_frames) == ("h264", 64, 48, 30)
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"


def test_colours_and_tensors(tmp_path):
    picture = torch.from_numpy(quarters().transpose(2, 0, 1).copy())
    write_video(tmp_path / "clip.mp4", [picture] * 3, 25)
    frame = next(read_frames(tmp_path / "clip.mp4"))
    assert (frame.data.float() - picture.float()).abs().mean() < 6


def test_the_index_comes_first(tmp_path):
    write_video(tmp_path / "clip.mp4", greys(5), 25)
    data = (tmp_path / "clip.mp4").read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat")


def test_frames_are_taken_one_by_one(tmp_path):
    # x264 looks ahead, so "one by one" is: the pictures handed over are not collected here.
    alive = []

    def source():
        for index in range(400):
            picture = torch.full((3, 16, 16), index % 255, dtype=torch.uint8)
            alive.append(weakref.ref(picture))
            yield picture
            del picture
            assert sum(one() is not None for one in alive) <= 2

    write_video(tmp_path / "clip.mp4", source(), 25)
    assert len(alive) == 400


def test_a_failure_leaves_the_old_file_and_no_new_one(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")

    def source():
        yield from greys(3)
        raise RuntimeError("the producer fails")

    with pytest.raises(RuntimeError, match="the producer fails"):
        write_video(path, source(), 25)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("frames", "settings", "message"),
    [
        (lambda: greys(2, (63, 48)), {}, "63x48"),
        (lambda: greys(2, (64, 47)), {}, "64x47"),
        (lambda: [next(greys(1)), next(greys(1, (32, 32)))], {}, "frame 1 is 32x32"),
        (lambda: [np.zeros((48, 64, 3), np.uint8)], {}, r"\[48, 64, 3\]"),
        (lambda: [np.zeros((3, 48, 64), np.float32)], {}, "float32"),
        (lambda: greys(2), {"fps": 0}, "fps is 0"),
        (lambda: greys(2), {"crf": 52}, "crf is 52"),
    ],
)
def test_wrong_input_is_named(tmp_path, frames, settings, message):
    with pytest.raises(ConfigError, match=message):
        write_video(tmp_path / "clip.mp4", frames(), **{"fps": 25, **settings})
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_one_error(tmp_path):
    with pytest.raises(VideoError, match="no frames"):
        write_video(tmp_path / "clip.mp4", [], 25)
    with pytest.raises(VideoError, match="no encoder libnothing"):
        write_video(tmp_path / "clip.mp4", greys(2), 25, codec="libnothing")
    with pytest.raises(VideoError, match=r"clip\.mp4 cannot be written: no such file"):
        write_video(tmp_path / "missing" / "clip.mp4", greys(2), 25)
    assert list(tmp_path.iterdir()) == []
