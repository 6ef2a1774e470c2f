"""Which frames are taken: rate, cap, the newest, evenly spread."""

import random
from fractions import Fraction

import pytest

from statekv.errors import ConfigError
from statekv.video.sampling import FrameSampler, Sampler, count_kept


def kept(sampler, times):
    return [time for time in times if sampler.keep(time)]


def stamps(rate, count, time_base, start=0.0):
    """Times of a constant rate, rounded to a container's time base."""
    return [start + float(round(Fraction(i) / rate / time_base) * time_base) for i in range(count)]


def test_no_limits_keep_every_frame():
    times = [0.0, 0.001, 0.5]
    assert kept(Sampler(), times) == times


def test_first_frame_of_each_cell():
    assert kept(Sampler(fps=2), [0.0, 0.2, 0.49, 0.5, 0.7, 1.9, 2.0]) == [0.0, 0.5, 1.9, 2.0]


def test_cells_start_at_the_streams_start():
    assert kept(Sampler(fps=1, start_seconds=8.3), [8.3, 9.0, 9.2, 9.3, 10.2, 10.3]) == [8.3, 9.3, 10.3]


@pytest.mark.parametrize("time_base", [Fraction(1, 90000), Fraction(1, 1000), Fraction(1, 12800)])
@pytest.mark.parametrize("rate", [Fraction(25), Fraction(30000, 1001), Fraction(24000, 1001), Fraction(60)])
@pytest.mark.parametrize("start", [0.0, 8.333007])
def test_a_clips_own_rate_keeps_all_its_frames(rate, time_base, start):
    times = stamps(rate, 5000, time_base, start)
    assert kept(Sampler(fps=float(rate), start_seconds=start), times) == times


@pytest.mark.parametrize("time_base", [Fraction(1, 90000), Fraction(1, 1000)])
def test_borders_do_not_jitter(time_base):
    times = stamps(Fraction(30), 3000, time_base)
    for every in (2, 3, 5, 6, 15):
        assert kept(Sampler(fps=30 / every), times) == times[::every]


def test_at_a_high_rate_neighbours_stay_apart():
    """Within a tenth of a cell of its border a frame is moved, here 0.2 ms, and no further."""
    assert kept(Sampler(fps=500), [0.0, 0.0012, 0.0019, 0.002]) == [0.0, 0.0019]


def test_frame_cap_lowers_the_rate_of_a_known_duration():
    sampler = Sampler(fps=10, max_frames=4, duration_seconds=8)
    assert sampler.rate == 0.5
    assert kept(sampler, [i / 10 for i in range(80)]) == [0.0, 2.0, 4.0, 6.0]


def test_fps_cap_stays_where_the_frame_cap_is_loose():
    assert Sampler(fps=1, max_frames=100, duration_seconds=8).rate == 1


def test_frame_cap_without_fps():
    assert Sampler(max_frames=4, duration_seconds=8).rate == 0.5


def test_frame_cap_of_unknown_duration_keeps_the_first():
    sampler = Sampler(fps=10, max_frames=3)
    assert kept(sampler, [i / 20 for i in range(100)]) == [0.0, 0.1, 0.2]
    assert sampler.exhausted


@pytest.mark.parametrize("real_seconds", [4, 8, 8.01, 80])
def test_never_more_than_max_frames_even_if_the_duration_lied(real_seconds):
    times = [i / 25 for i in range(int(real_seconds * 25))]
    for cap in (1, 3, 7, 33):
        assert len(kept(Sampler(max_frames=cap, duration_seconds=8), times)) <= cap


def test_exhausted_only_once_full():
    sampler = Sampler(fps=1, max_frames=2)
    assert not sampler.exhausted
    sampler.keep(0.0)
    assert not sampler.exhausted
    sampler.keep(1.0)
    assert sampler.exhausted
    assert not sampler.keep(2.0)
    assert not Sampler(fps=1).exhausted


@pytest.mark.parametrize("seed", range(20))
def test_count_in_any_order_equals_keeping_in_order(seed):
    generator = random.Random(seed)
    times = sorted(3 + generator.random() * 20 for _ in range(300))
    shuffled = generator.sample(times, len(times))
    capped = {"max_frames": 50, "duration_seconds": 20}
    for limits in ({"fps": 3.7}, {"fps": 0.3, "max_frames": 4}, capped, {}):
        count = count_kept(Sampler(**limits, start_seconds=3), shuffled)
        assert count == len(kept(Sampler(**limits, start_seconds=3), times))


def test_counting_leaves_the_sampler_fresh():
    sampler = Sampler(fps=1, max_frames=1)
    count_kept(sampler, [0.0, 1.0])
    assert sampler.keep(0.0)


@pytest.mark.parametrize(
    ("limits", "named"),
    [
        ({"fps": 0}, "fps is 0"),
        ({"fps": -1}, "fps is -1"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"max_frames": 0}, "max_frames is 0"),
        ({"duration_seconds": 0.0}, "duration_seconds is 0.0"),
    ],
)
def test_limits_must_be_positive(limits, named):
    with pytest.raises(ConfigError, match=named) as caught:
        Sampler(**limits)
    assert caught.value.hint


def test_a_sampler_is_a_value_that_samples_any_number_of_videos():
    sampler = FrameSampler(fps=10, max_frames=4)
    assert sampler == FrameSampler(10, 4)
    for _ in range(2):
        assert kept(sampler.begin(duration_seconds=8), [i / 10 for i in range(80)]) == [0.0, 2.0, 4.0, 6.0]
    assert kept(sampler.begin(3.0), [3.0, 3.05, 3.1, 3.2, 3.3, 3.4]) == [3.0, 3.1, 3.2, 3.3]


def test_uniform_needs_a_length():
    sampler = FrameSampler(max_frames=2, uniform=True)
    assert sampler.chooses
    assert kept(sampler.begin(duration_seconds=4), range(4)) == [0, 2]
    for asked in (sampler.begin, lambda: sampler.check_length(None)):
        with pytest.raises(ConfigError, match="length of this source is unknown"):
            asked()
    FrameSampler(max_frames=2).check_length(None)


def test_the_newest_are_seen_together():
    sampler = FrameSampler(newest=3)
    assert sampler.chooses
    assert [sampler.together(frames) for frames in (0, 2, 3, 9)] == [0, 2, 3, 3]
    assert FrameSampler().together(9) == 9
    assert not FrameSampler(fps=1, max_frames=4).chooses
    with pytest.raises(ConfigError, match="newest is 0"):
        FrameSampler(newest=0)
