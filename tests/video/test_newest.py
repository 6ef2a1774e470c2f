import threading

import pytest
import torch

from statekv.errors import VideoError
from statekv.video.frame import Frame
from statekv.video.newest import NewestFrames

PICTURE = torch.zeros(3, 2, 2, dtype=torch.uint8)


def frame(pts, gap=0.0):
    return Frame(PICTURE, pts, 0.0, gap)


def taken(frames):
    frames.end()
    found = []
    while (one := frames.get()) is not None:
        found.append(one[0])
    return found


@pytest.fixture
def now(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    return clock


def test_in_order_and_with_the_moment_they_were_due():
    frames = NewestFrames(4, 10.0)
    for pts in range(3):
        frames.put(frame(pts), due=pts + 0.5)
    found = [one for one in (frames.get(), frames.get()) if one is not None]
    assert [(one.pts_seconds, due) for one, due in found] == [(0, 0.5), (1, 1.5)]
    assert frames.dropped == 0


def test_the_oldest_make_room():
    frames = NewestFrames(2, 10.0)
    for pts in range(7):
        frames.put(frame(pts), 0.0)
    assert frames.dropped == 5
    assert [found.pts_seconds for found in taken(frames)] == [5, 6]


def test_what_has_waited_too_long_goes_but_never_the_newest(now):
    frames = NewestFrames(10, 2.0)
    for pts in (0, 1, 2, 3):
        now[0] = pts
        frames.put(frame(pts), pts)
    assert frames.dropped == 1
    now[0] = 100.0
    assert [found.pts_seconds for found in taken(frames)] == [3]
    assert frames.dropped == 3


def test_a_gap_outlives_the_frame_behind_it():
    frames = NewestFrames(1, 10.0)
    frames.put(frame(5, gap=2.0), 0.0)
    frames.put(frame(9, gap=3.0), 0.0)
    (last,) = taken(frames)
    assert (last.pts_seconds, last.gap_seconds) == (9, 5.0)


def test_an_error_comes_once_and_behind_the_frames():
    frames = NewestFrames(2, 10.0)
    frames.put(frame(0), 0.0)
    frames.end(VideoError("gone"))
    assert frames.get() is not None
    with pytest.raises(VideoError, match="gone"):
        frames.get()
    assert frames.get() is None


def test_readiness():
    frames = NewestFrames(2, 10.0)
    assert not frames.ready(0.0)
    frames.put(frame(0), 0.0)
    assert frames.ready(0.0)
    frames.clear()
    assert not frames.ready(0.0)
    frames.end()
    assert frames.ready(0.0)


def test_who_waits_is_woken():
    frames = NewestFrames(2, 10.0)
    found: list[tuple[Frame, float] | None] = []
    waiting = threading.Thread(target=lambda: found.append(frames.get()))
    waiting.start()
    frames.put(frame(7), 0.0)
    waiting.join(5)
    assert found[0] is not None
    assert found[0][0].pts_seconds == 7
