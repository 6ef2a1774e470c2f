"""What a stream draws from: any frames, frames of another thread, and the queue that keeps the newest."""

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from statekv.errors import ConfigError, VideoError
from statekv.video.frame import Frame
from statekv.video.sampling import FrameSampler
from statekv.video.source import FrameBuffer, IteratorSource, LiveStatus, PushedSource, Source, as_source

PICTURE = torch.zeros(3, 2, 2, dtype=torch.uint8)


def frame(pts, gap=0.0):
    return Frame(PICTURE, pts, 0.0, gap)


def times(frames):
    return [one.pts_seconds for one in frames]


@pytest.fixture
def now(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    return clock


def test_any_frames_are_a_source_that_waits_and_is_read_once():
    closed = []

    def frames() -> Iterator[Frame]:
        try:
            yield from (frame(0), frame(1))
        finally:
            closed.append(True)

    source = as_source(frames())
    assert isinstance(source, IteratorSource)
    assert source.ready(0.0)
    assert (source.live, source.status, source.facts(), source.fork()) == (False, None, None, None)
    assert next(source).pts_seconds == 0
    source.close()
    assert closed == [True]
    assert list(source) == []
    as_source([frame(0)]).close()  # where there is nothing to close


def test_a_source_is_taken_as_it_is():
    class Radio:  # nothing of ours
        live = True
        status = LiveStatus(True, 0.0, 0, 0, 0.0)

        def __iter__(self):
            return self

        def __next__(self):
            raise StopIteration

        def ready(self, timeout_seconds):
            return True

        def facts(self):
            return None

        def fork(self):
            return None

        def close(self):
            pass

    radio = Radio()
    assert as_source(radio) is radio
    assert not isinstance(iter([]), Source)


def test_what_gives_no_frames_is_no_source():
    with pytest.raises(ConfigError, match="cannot be drawn from a whole number"):
        as_source(5)  # type: ignore[arg-type]


def test_pushed_frames_come_in_order_and_with_the_times_given():
    source = PushedSource(max_lag_seconds=60)
    source.put(frame(2.5))
    source.put(PICTURE, 2.5)
    source.put(np.zeros((3, 2, 2), np.uint8), pts_seconds=9)
    source.end()
    assert times(source) == [2.5, 2.5, 9]
    assert (source.live, source.facts(), source.fork()) == (True, None, None)


def test_without_times_it_is_their_arrival_that_counts(now):
    source = PushedSource(start_seconds=7.0, max_lag_seconds=1000)
    for came in (100.0, 100.5, 103.0):
        now[0] = came
        source.put(PICTURE)
    source.put(PICTURE, 20.0)
    now[0] = 104.0
    source.put(PICTURE)
    source.end()
    assert times(source) == [7.0, 7.5, 10.0, 20.0, 21.0]


def test_pixels_may_be_written_to_again():
    buffer = bytearray(12)
    source = PushedSource(max_lag_seconds=60)
    source.put(np.frombuffer(bytes(buffer), np.uint8).reshape(3, 2, 2))  # may not be written to
    pixels = np.frombuffer(buffer, np.uint8).reshape(2, 2, 3).transpose(2, 0, 1)
    source.put(pixels[:, ::-1])
    tensor = torch.zeros(3, 2, 2, dtype=torch.uint8)
    source.put(tensor)
    buffer[:] = b"\xff" * 12
    tensor.fill_(255)
    assert [int(next(source).data.max()) for _ in range(3)] == [0, 0, 0]


def test_time_does_not_run_backwards():
    source = PushedSource(max_lag_seconds=60)
    source.put(frame(3.0))
    with pytest.raises(ConfigError, match=r"a frame at 2\.5 s came after one at 3\.0 s"):
        source.put(PICTURE, 2.5)
    source.put(frame(3.5))
    source.end()
    assert times(source) == [3.0, 3.5]


def test_what_is_no_frame_is_refused_and_the_next_is_taken():
    source = PushedSource(max_lag_seconds=60)
    with pytest.raises(VideoError, match="channels first"):
        source.put(np.zeros((4, 6, 3), np.uint8))
    with pytest.raises(VideoError, match=r"torch\.float32"):
        source.put(torch.zeros(3, 4, 6))
    with pytest.raises(VideoError, match="must be finite"):
        source.put(PICTURE, float("nan"))
    with pytest.raises(ConfigError, match="a bytes object was put"):
        source.put(b"jpeg")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"has the time 1\.0 s already"):
        source.put(frame(1.0), 2.0)
    source.put(frame(0.0))
    source.end()
    assert times(source) == [0.0]


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"depth": 0}, "depth is 0"),
        ({"max_lag_seconds": -1.0}, "max_lag_seconds is -1"),
        ({"max_lag_seconds": float("nan")}, "max_lag_seconds is nan"),
        ({"sampler": FrameSampler(max_frames=4, uniform=True)}, "length of this source is unknown"),
    ],
)
def test_settings_of_pushed_sources_are_checked(wrong, named):
    with pytest.raises(ConfigError, match=named):
        PushedSource(**wrong)


def test_a_slow_reader_sees_the_newest_and_the_rest_is_counted(now):
    source = PushedSource(depth=3, max_lag_seconds=60)
    assert source.status == LiveStatus(True, 0.0, 0, 0, 0.0)
    for pts in range(10):
        now[0] = pts
        source.put(frame(pts))
    assert next(source).pts_seconds == 7
    now[0] = 12.0
    assert source.status == LiveStatus(True, 5.0, 7, 0, 0.0)
    source.end()
    assert times(source) == [8, 9]
    assert not source.status.connected
    assert repr(source) == "PushedSource(pts_seconds=9, dropped=7, ended=True)"


def test_pushed_frames_are_sampled_before_they_wait():
    source = PushedSource(FrameSampler(fps=2, max_frames=4), depth=4, max_lag_seconds=60)
    for index in range(100):
        source.put(frame(50 + index / 10, gap=1.0 if index in (7, 23) else 0.0))
    assert times(source) == [50, 50.5, 51, 51.5]  # four, and no end had to be told
    assert source.status.dropped == 0


def test_a_gap_is_told_with_the_next_frame_that_is_kept():
    source = PushedSource(FrameSampler(fps=1), max_lag_seconds=60)
    for pts, gap in ((0, 0.0), (0.5, 0.25), (0.75, 0.25), (1.0, 0.0)):
        source.put(frame(pts, gap))
    source.end()
    assert [one.gap_seconds for one in source] == [0.0, 0.5]
    assert (source.status.gaps, source.status.gap_seconds) == (2, 0.5)


def test_behind_the_end_nothing_is_taken():
    source = PushedSource(max_lag_seconds=60)
    source.put(frame(0))
    source.end()
    source.end()
    with pytest.raises(ConfigError, match="after the end"):
        source.put(frame(1))
    assert source.ready(0.0)
    assert times(source) == [0]


def test_closing_lets_go_and_wakes_who_waits():
    source, found = PushedSource(), []
    reader = threading.Thread(target=lambda: found.append(next(source, None)))
    reader.start()
    time.sleep(0.02)
    source.close()
    reader.join(5)
    assert found == [None]
    with pytest.raises(ConfigError, match="after the end"):
        source.put(frame(0))


def test_many_threads_may_put():
    source = PushedSource(depth=1000, max_lag_seconds=60)

    def put():
        for _ in range(50):
            source.put(PICTURE)

    writers = [threading.Thread(target=put) for _ in range(8)]
    for writer in writers:
        writer.start()
    found = [next(source) for _ in range(400)]
    for writer in writers:
        writer.join()
    assert times(found) == sorted(times(found))
    assert source.status.dropped == 0


def taken(frames):
    frames.end()
    found = []
    while (one := frames.get()) is not None:
        found.append(one[0])
    return found


def test_in_order_and_with_the_moment_they_were_due():
    frames = FrameBuffer(4, 10.0)
    for pts in range(3):
        frames.put(frame(pts), due=pts + 0.5)
    found = [one for one in (frames.get(), frames.get()) if one is not None]
    assert [(one.pts_seconds, due) for one, due in found] == [(0, 0.5), (1, 1.5)]
    assert frames.dropped == 0


def test_the_oldest_make_room():
    frames = FrameBuffer(2, 10.0)
    for pts in range(7):
        frames.put(frame(pts), 0.0)
    assert frames.dropped == 5
    assert [found.pts_seconds for found in taken(frames)] == [5, 6]


def test_what_has_waited_too_long_goes_but_never_the_newest(now):
    frames = FrameBuffer(10, 2.0)
    for pts in (0, 1, 2, 3):
        now[0] = pts
        frames.put(frame(pts), pts)
    assert frames.dropped == 1
    now[0] = 100.0
    assert [found.pts_seconds for found in taken(frames)] == [3]
    assert frames.dropped == 3


def test_a_gap_outlives_the_frame_behind_it():
    frames = FrameBuffer(1, 10.0)
    frames.put(frame(5, gap=2.0), 0.0)
    frames.put(frame(9, gap=3.0), 0.0)
    (last,) = taken(frames)
    assert (last.pts_seconds, last.gap_seconds) == (9, 5.0)


def test_an_error_comes_once_and_behind_the_frames():
    frames = FrameBuffer(2, 10.0)
    frames.put(frame(0), 0.0)
    frames.end(VideoError("gone"))
    assert frames.get() is not None
    with pytest.raises(VideoError, match="gone"):
        frames.get()
    assert frames.get() is None


def test_readiness():
    frames = FrameBuffer(2, 10.0)
    assert not frames.ready(0.0)
    frames.put(frame(0), 0.0)
    assert frames.ready(0.0)
    frames.clear()
    assert not frames.ready(0.0)
    frames.end()
    assert frames.ready(0.0)


def test_who_waits_is_woken():
    frames = FrameBuffer(2, 10.0)
    found: list[tuple[Frame, float] | None] = []
    waiting = threading.Thread(target=lambda: found.append(frames.get()))
    waiting.start()
    frames.put(frame(7), 0.0)
    waiting.join(5)
    assert found[0] is not None
    assert found[0][0].pts_seconds == 7
