"""Times that go forward, whatever the stamps of a file or a live stream say."""

import pytest

from statekv.video.clock import Clock, LiveClock, parse_timestamp


def test_sound_stamps_pass_unchanged():
    clock = Clock(8.0, 0.04)
    assert [clock.tick(pts, 0.1) for pts in (8.0, 8.1, 9.0)] == [(8.0, 0.1), (8.1, 0.1), (9.0, 0.1)]
    assert clock.end_seconds == 9.1


def test_missing_stamps_follow_the_previous_frame():
    clock = Clock(2.0, 0.5)
    assert [clock.tick(None, None)[0] for _ in range(3)] == [2.0, 2.5, 3.0]
    assert clock.tick(4.0, 1.0) == (4.0, 1.0)
    assert clock.tick(None, None)[0] == 5.0


def test_a_clock_that_restarts_goes_on():
    clock = Clock(0.0, 0.5)
    assert [clock.tick(pts, None)[0] for pts in (0.0, 0.5, 1.0, 0.0, 0.5)] == [0.0, 0.5, 1.0, 1.5, 2.0]


def test_started_after_the_first_frame():
    clock = Clock(0.0, 0.0)
    assert not clock.started
    clock.tick(None, None)
    assert clock.started


@pytest.mark.parametrize(
    ("text", "seconds"), [("00:00:06.600000000", 6.6), ("01:02:03", 3723.0), ("", None), ("6.6", None)]
)
def test_parse_timestamp(text, seconds):
    assert parse_timestamp(text) == seconds


def live_times(*ticks):
    clock = LiveClock()
    return [clock.tick(pts, now) for pts, now in ticks]


def test_live_times_count_from_the_first_frame_by_the_streams_stamps():
    assert live_times((50.0, 1000.0), (50.1, 1000.3), (50.2, 1000.31)) == pytest.approx([0, 0.1, 0.2])


def test_without_stamps_a_live_time_is_when_the_frame_came():
    assert live_times((None, 7.0), (None, 7.4), (None, 9.0)) == pytest.approx([0, 0.4, 2.0])


@pytest.mark.parametrize("stamp", [0.0, 5000.0])
def test_a_live_stream_that_jumps_is_set_against_the_wall_again(stamp):
    assert live_times((50.0, 100.0), (51.0, 101.0), (stamp, 103.0), (stamp + 1, 104.0)) == pytest.approx([0, 1, 3, 4])


def test_the_same_stamp_twice_is_no_jump():
    assert live_times((50.0, 100.0), (50.0, 100.5), (51.0, 101.0)) == [0, 0, 1]


def test_a_new_connection_goes_on_by_the_wall():
    clock = LiveClock()
    assert clock.tick(50.0, 100.0) == 0
    assert clock.tick(52.0, 101.0) == 2
    clock.reconnect()
    assert clock.tick(52.5, 111.0) == 11
    assert clock.tick(53.5, 111.5) == 12


def test_live_times_never_run_backwards():
    clock = LiveClock()
    clock.tick(0.0, 0.0)
    clock.tick(8.0, 1.0)
    clock.reconnect()
    assert [clock.tick(0.0, 2.0), clock.tick(1.0, 3.0)] == [8, 9]
    assert clock.tick(None, 4.0) == 9


def test_a_clock_goes_on_from_another_process():
    clock = LiveClock()
    clock.go_on(last_seconds=20.0, elapsed_seconds=50.0, now_seconds=1000.0)
    assert [clock.tick(3.0, 1001.0), clock.tick(4.0, 1002.5), clock.tick(None, 1005.0)] == [51, 52, 55]


def test_a_clock_goes_on_although_the_wall_was_set_back():
    clock = LiveClock()
    clock.go_on(last_seconds=20.0, elapsed_seconds=-400.0, now_seconds=1000.0)
    assert [clock.tick(3.0, 1001.0), clock.tick(4.0, 1002.0)] == [21, 22]
