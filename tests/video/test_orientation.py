import struct

import numpy as np
import pytest

from statekv.video.orientation import Orientation


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
