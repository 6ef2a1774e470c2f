"""What has not moved is left out, and never differs from what stands for it by more than the threshold."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from statekv.errors import ConfigError
from statekv.models.encoded import EncodedStep
from statekv.reduce.base import Memory, reduced
from statekv.reduce.static import Static
from tests.talk import assert_same_stream, frames_of, shared_engine, some_frames
from tests.tiny import EVERY_MODEL, video

TOTAL, HIDDEN = 12, 16


def features(seed: int, total: int = TOTAL) -> torch.Tensor:
    return torch.randn(total, HIDDEN, generator=torch.Generator().manual_seed(seed))


def watched(static: Static, pictures: list[torch.Tensor], grid: tuple[int, int] = (3, 4)) -> list[list[int]]:
    """Which tokens of each picture go on."""
    memory: Memory = {}
    kept = []
    for picture in pictures:
        found, memory = reduced(static, EncodedStep((), picture, grid), memory)
        assert torch.equal(found.features, picture[found.places])
        kept.append(found.places.tolist())
    return kept


def test_of_a_still_picture_one_token_goes_on_at_each_step() -> None:
    kept = watched(Static(0.1), [features(0)] * 4)
    assert kept[0] == list(range(TOTAL))
    assert [len(places) for places in kept[1:]] == [1, 1, 1]


def test_after_a_cut_everything_goes_on() -> None:
    assert watched(Static(0.1), [features(0), features(0), features(1)])[2] == list(range(TOTAL))


def test_just_the_tokens_that_moved_go_on() -> None:
    moved = features(0)
    moved[[2, 7]] = features(1)[[2, 7]]
    assert watched(Static(0.1), [features(0), moved, moved])[1] == [2, 7]


def test_length_is_no_movement() -> None:
    assert len(watched(Static(0.1), [features(0), 3 * features(0)])[1]) == 1


def test_threshold_0_leaves_out_nothing_and_remembers_nothing() -> None:
    assert watched(Static(0.0), [features(0)] * 3) == [list(range(TOTAL))] * 3
    assert reduced(Static(0.0), EncodedStep((), features(0), (3, 4)), {})[1] == {}


def test_a_slow_change_does_not_pass_unseen() -> None:
    """From picture to picture less than the threshold, but never more than it from what went on last."""
    start, end, threshold = features(0), features(1), 0.05
    pictures = [torch.lerp(start, end, step / 60) for step in range(61)]
    memory: Memory = {}
    standing, dropped = torch.zeros(TOTAL, HIDDEN), 0
    for picture in pictures:
        found, memory = reduced(Static(threshold), EncodedStep((), picture, (3, 4)), memory)
        standing[found.places] = found.features
        dropped += TOTAL - len(found.features)
        distance = 1 - torch.cosine_similarity(standing, picture, dim=-1)
        assert distance.max() <= threshold + 1e-6
    assert dropped > 30 * TOTAL
    steps = [1 - torch.cosine_similarity(a, b, dim=-1).min() for a, b in pairwise(pictures)]
    assert max(steps) < threshold


def test_more_goes_on_the_lower_the_threshold() -> None:
    pictures = [features(0) + 0.3 * step * features(1) for step in range(5)]
    counts = [sum(map(len, watched(Static(threshold), pictures))) for threshold in (0, 0.01, 0.05, 0.2, 1, 2)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 5 * TOTAL
    assert counts[-1] == TOTAL + 4


def test_a_picture_of_another_grid_goes_on_whole() -> None:
    memory: Memory = {}
    for grid, expected in (((3, 4), TOTAL), ((4, 3), TOTAL), ((4, 3), 1), ((2, 4), 8)):
        step = EncodedStep((), features(0, grid[0] * grid[1]), grid)
        found, memory = reduced(Static(0.1), step, memory)
        assert len(found.features) == expected


def test_half_precision_is_compared_in_full() -> None:
    half = features(0).half()
    assert len(watched(Static(1e-3), [half, half])[1]) == 1


@pytest.mark.parametrize("threshold", [-0.1, 2.1, float("nan")])
def test_a_threshold_that_is_no_distance_is_refused(threshold: float) -> None:
    with pytest.raises(ConfigError, match=rf"threshold is {threshold}, but must be a cosine distance from 0 to 2"):
        Static(threshold)


@pytest.mark.parametrize("family", EVERY_MODEL)
def test_threshold_0_is_no_reducer_to_the_bit(family: str) -> None:
    plain, reducing = (shared_engine(family).open(budget=25, reduce=name) for name in (None, "static(threshold=0)"))
    for session in (plain, reducing):
        session.push(some_frames(9))
    assert_same_stream(reducing, plain)


@pytest.mark.parametrize("family", EVERY_MODEL)
def test_a_still_video_costs_a_token_a_step(family: str) -> None:
    """Besides the words around it; its positions go on as if nothing had been left out."""
    still = video(1).repeat(8, 1, 1, 1)
    plain, reducing = (shared_engine(family).open(budget=1000, reduce=name) for name in (None, "static"))
    for session in (plain, reducing):
        session.push(frames_of(still))
    a, b = reducing.state, plain.state
    assert (a.position, a.frames) == (b.position, b.frames)
    steps = [[span for span in state.spans if span.kind == "step"] for state in (a, b)]
    picture = steps[1][1].length - steps[0][1].length + 1
    assert picture > 1
    assert steps[0][0].length == steps[1][0].length
    assert all(one.length == other.length - picture + 1 for one, other in zip(*(s[1:] for s in steps), strict=True))
    assert [span.position for span in a.spans] == [span.position for span in b.spans]
