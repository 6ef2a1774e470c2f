"""A frame is pixels and times of the right kind, the right way up."""

import dataclasses
import struct

import numpy as np
import pytest
import torch

from statekv.errors import VideoError
from statekv.video.frame import Frame, Orientation


def test_holds_pixels_and_times():
    frame = Frame(torch.zeros(3, 4, 6, dtype=torch.uint8), 1.5, 0.04)
    assert (frame.pts_seconds, frame.duration_seconds) == (1.5, 0.04)
    with pytest.raises(dataclasses.FrozenInstanceError):
        frame.pts_seconds = 2.0  # type: ignore[misc]


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3), (1, 3, 4, 6), (1, 4, 6), (3, 0, 6)])
def test_refuses_other_shapes(shape):
    with pytest.raises(VideoError, match=r"must be \[3, H, W\]"):
        Frame(torch.zeros(shape, dtype=torch.uint8), 0.0)


def test_refuses_other_types():
    with pytest.raises(VideoError, match=r"torch\.float32"):
        Frame(torch.zeros(3, 4, 6), 0.0)


@pytest.mark.parametrize(
    ("pts", "duration"), [(float("nan"), 0.0), (float("inf"), 0.0), (0.0, -1.0), (0.0, float("nan"))]
)
def test_refuses_times_that_are_none(pts, duration):
    with pytest.raises(VideoError, match="must be finite"):
        Frame(torch.zeros(3, 4, 6, dtype=torch.uint8), pts, duration)


def test_hint_names_the_way_out_for_channels_last():
    with pytest.raises(VideoError) as caught:
        Frame(torch.zeros(4, 6, 3, dtype=torch.uint8), 0.0)
    assert "permute(2, 0, 1)" in caught.value.hint


def test_a_frame_is_told_without_its_pixels():
    data = torch.zeros(3, 4, 6, dtype=torch.uint8)
    assert repr(Frame(data, 1.5)) == "Frame(6x4, pts_seconds=1.5)"
    assert repr(Frame(data, 90000.25, 0.04, 2.0)) == "Frame(6x4, pts_seconds=90000.25, gap_seconds=2.0)"


def matrix(a, b, c, d):
    return struct.pack("9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)


# The matrix moves a stored point (x, y), y down, to (ax + cy, bx + dy): where do the corners of
#   1 2
#   3 4
# go? Worked out by hand, point by point.
@pytest.mark.parametrize(
    ("entries", "seen"),
    [
        ((1, 0, 0, 1), [[1, 2], [3, 4]]),
        ((0, 1, -1, 0), [[3, 1], [4, 2]]),
        ((0, -1, 1, 0), [[2, 4], [1, 3]]),
        ((-1, 0, 0, -1), [[4, 3], [2, 1]]),
        ((-1, 0, 0, 1), [[2, 1], [4, 3]]),
        ((1, 0, 0, -1), [[3, 4], [1, 2]]),
        ((0, 1, 1, 0), [[1, 3], [2, 4]]),
        ((0, -1, -1, 0), [[4, 2], [3, 1]]),
    ],
)
def test_all_eight_orientations(entries, seen):
    stored = np.array([[1, 2], [3, 4]], np.uint8)[:, :, None].repeat(3, axis=2)
    assert Orientation.from_matrix(matrix(*entries)).upright(stored)[:, :, 0].tolist() == seen


def test_no_matrix_is_upright():
    assert Orientation.from_matrix(None) == Orientation(mirrored=False, rotation_degrees=0)


def test_a_numpy_picture_is_taken():
    pixels = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
    assert torch.equal(Frame(pixels, 0.0).data, torch.from_numpy(pixels))  # type: ignore[arg-type]
    turned = Frame(pixels.transpose(0, 2, 1)[:, ::-1], 0.0).data  # type: ignore[arg-type]
    assert turned.tolist() == pixels.transpose(0, 2, 1)[:, ::-1].tolist()


@pytest.mark.parametrize(
    ("pixels", "told"),
    [
        (np.zeros((3, 4, 5), np.float32), "float32, must be"),
        (np.zeros((3, 4, 5), np.uint16), "uint16, must be"),
        (np.zeros((4, 5, 3), np.uint8), "channels first"),
        ([[0]], "a list, must be a tensor or a numpy array"),
    ],
    ids=["float", "wide", "channels last", "list"],
)
def test_other_pictures_are_refused(pixels, told):
    with pytest.raises(VideoError, match=told):
        Frame(pixels, 0.0)


@pytest.mark.parametrize("seconds", [1, np.float32(1), np.int64(1), np.float64(1)], ids=lambda one: type(one).__name__)
def test_a_time_is_any_real_number(seconds):
    assert Frame(torch.zeros(3, 4, 5, dtype=torch.uint8), seconds).pts_seconds == 1
