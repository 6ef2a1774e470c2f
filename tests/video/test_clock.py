import pytest

from statekv.video.clock import Clock, parse_timestamp


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
