"""Attention over all steps: between the paper's rule and heavy hitters."""

from __future__ import annotations

import pytest
import torch

from statekv.cache.policies.accumulated import Accumulated
from statekv.errors import ConfigError
from tests.cache.policies.judging import SHAPE, asked, scores


def steps(judged: Accumulated, *attentions: torch.Tensor) -> torch.Tensor:
    """Scores of the last of several steps over the same keys."""
    state = {"accumulated": torch.zeros(SHAPE)}
    return [asked(judged, attention, state=state) for attention in attentions][-1]


def test_without_decay_it_is_the_sum_and_with_a_decay_of_0_the_paper() -> None:
    one, two, three = scores(1), scores(2), scores(3)
    assert torch.equal(steps(Accumulated(decay=1), one, two, three), one + two + three)
    assert torch.equal(steps(Accumulated(decay=0), one, two, three), three)
    assert torch.equal(steps(Accumulated(decay=0, maximum=True), one, two, three), three)


def test_a_decay_weighs_the_past() -> None:
    one, two, three = scores(1), scores(2), scores(3)
    torch.testing.assert_close(steps(Accumulated(decay=0.5), one, two, three), one / 4 + two / 2 + three)
    highest = torch.maximum(torch.maximum(one / 4, two / 2), three)
    torch.testing.assert_close(steps(Accumulated(decay=0.5, maximum=True), one, two, three), highest)


def test_scores_are_not_what_is_remembered() -> None:
    """Who wraps the policy may change the scores."""
    state = {"accumulated": torch.zeros(SHAPE)}
    asked(Accumulated(), scores(), state=state).zero_()
    assert torch.equal(state["accumulated"], scores())


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
def test_a_decay_outside_its_range_is_refused(decay: float) -> None:
    with pytest.raises(ConfigError, match="must be a number from 0 to 1"):
        Accumulated(decay=decay)
