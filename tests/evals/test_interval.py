"""The bootstrap over videos: its width where it is known, pairs kept together, the same every time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from statekv.evals.interval import Rows, interval


def rows_of(scores: Sequence[Sequence[bool]]) -> dict[str, list[Mapping[str, Any]]]:
    """Rows of each video."""
    return {f"v{number}": [{"score": score} for score in video] for number, video in enumerate(scores)}


def mean(rows: Rows) -> float:
    return sum(bool(row["score"]) for row in rows) / len(rows)


def test_independent_videos_have_the_binomial_width() -> None:
    scores = np.random.default_rng(1).random(400) < 0.7
    low, high = interval(rows_of([[score] for score in scores]), mean)
    share = scores.mean()
    half = 1.96 * math.sqrt(share * (1 - share) / 400)
    assert low == pytest.approx(share - half, abs=0.008)
    assert high == pytest.approx(share + half, abs=0.008)


def test_questions_of_one_video_count_as_one() -> None:
    scores = np.random.default_rng(2).random(100) < 0.6
    once = interval(rows_of([[score] for score in scores]), mean)
    five_times = interval(rows_of([[score] * 5 for score in scores]), mean)
    assert five_times == pytest.approx(once)


def test_what_both_get_wrong_does_not_widen_the_difference() -> None:
    ours = [[bool(number % 2)] * 2 for number in range(50)]
    theirs = [list(video) for video in ours]
    assert interval(rows_of(ours), mean, rows_of(theirs)) == (0.0, 0.0)
    theirs[0] = [not score for score in theirs[0]]
    low, high = interval(rows_of(ours), mean, rows_of(theirs))
    assert -0.1 < low < 0 == high


def test_the_same_every_time() -> None:
    rows = rows_of([[True, False], [False], [True]] * 5)
    assert interval(rows, mean) == interval(dict(reversed(rows.items())), mean)


@pytest.mark.parametrize("videos", [0, 1])
def test_too_few_videos_tell_nothing(videos: int) -> None:
    assert all(math.isnan(end) for end in interval(rows_of([[True, False]] * videos), mean))
