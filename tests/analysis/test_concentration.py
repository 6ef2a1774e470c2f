"""Figures 6, 7 and 8 against the sets of their definition, written out token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from statekv.analysis.concentration import BUDGETS, Concentration, LayerShares

STEP = 3  # tokens of each step
HEADS = 2


def watched(steps: Sequence[torch.Tensor], carried: int = 4) -> LayerShares:
    """One layer's shares out of its key scores at each step from the second on, [heads, history + own]."""
    found = Concentration([5])
    for scores in steps:
        history = scores.shape[1] - STEP
        held = torch.arange(min(carried, history)).expand(len(scores), -1)
        found.begin(history, {5: held})
        found.observe(5, scores[None])
        found.observe(6, torch.full((1, HEADS, 1), math.nan))  # another layer is none of its business
    (shares,) = found.shares()
    return shares


def random_scores(steps: int, prefix: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    lengths = [prefix + STEP * (step + 2) for step in range(steps)]
    return [torch.rand(HEADS, length, generator=generator) ** 6 for length in lengths]


def best(scores: torch.Tensor, budget: int) -> set[int]:
    """K(B) of one head."""
    history = len(scores) - STEP
    return set(sorted(range(history), key=lambda token: -float(scores[token]))[:budget])


def mass(scores: torch.Tensor, tokens: set[int]) -> float:
    return math.fsum(float(scores[token]) for token in tokens)


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


@pytest.mark.parametrize("index", range(6))
def test_shares_are_those_of_the_definition(index: int) -> None:
    steps, budget = random_scores(5), BUDGETS[index]
    found = watched(steps)
    captured, recall, retention = [], [], []
    for number, scores in enumerate(steps):
        for head in range(HEADS):
            row, history = scores[head], scores.shape[1] - STEP
            now = best(row, budget)
            captured.append(mass(row, now) / mass(row, set(range(history))))
            if number:
                before = best(steps[number - 1][head], budget)
                pool = before | set(range(history - STEP, history))
                recall.append(mass(row, now & pool) / mass(row, now))
                retention.append(len(now & before) / len(before))
    assert found.captured[index] == pytest.approx(mean(captured), rel=1e-9)
    assert found.recall[index] == pytest.approx(mean(recall), rel=1e-9)
    assert found.retention[index] == pytest.approx(mean(retention), rel=1e-9)
    assert found.churn[index] == pytest.approx(1 - mean(retention), rel=1e-9)


def test_what_the_cache_holds_is_measured_beside_the_best_of_as_many() -> None:
    steps = random_scores(4)
    found = watched(steps, carried=6)
    shares, optimum = [], []
    for scores in steps:
        for row in scores:
            history = len(row) - STEP
            shares.append(mass(row, set(range(min(6, history)))) / mass(row, set(range(history))))
            optimum.append(mass(row, best(row, 6)) / mass(row, set(range(history))))
    assert found.carried == pytest.approx(mean(shares), rel=1e-9)
    assert found.best == pytest.approx(mean(optimum), rel=1e-9)
    assert found.carried < found.best


def test_a_budget_above_the_stream_captures_all_and_replaces_nothing() -> None:
    found = watched(random_scores(4))
    for index, budget in enumerate(BUDGETS):
        if budget >= 2 + 4 * STEP:
            assert found.captured[index] == pytest.approx(1)
            assert found.recall[index] == pytest.approx(1)
            assert found.churn[index] == 0


def test_captured_grows_with_the_budget() -> None:
    found = watched(random_scores(5))
    assert list(found.captured) == sorted(found.captured)
    assert found.captured[0] < found.captured[2] < found.captured[-1]


def test_what_lies_behind_the_largest_budget_counts_though_it_is_not_kept() -> None:
    most, generator = BUDGETS[-1], torch.Generator().manual_seed(1)
    steps = [torch.rand(1, most + 2000 + more, generator=generator) for more in (0, STEP)]
    found = watched(steps)
    shares = []
    for (row,) in steps:
        shares.append(mass(row, best(row, most)) / mass(row, set(range(len(row) - STEP))))
    before, now = (best(row, most) for (row,) in steps)
    assert found.captured[-1] == pytest.approx(mean(shares), rel=1e-6)
    assert found.captured[-1] < 1
    assert found.retention[-1] == pytest.approx(len(before & now) / most, rel=1e-9)


def peaked(length: int, *favourites: int) -> torch.Tensor:
    """Scores of a step that wants some tokens above all, the same in each head."""
    scores = torch.linspace(0.01, 0.02, length)
    for rank, token in enumerate(favourites):
        scores[token] = 1 - 0.1 * rank
    return scores.expand(HEADS, -1)


@pytest.mark.parametrize(
    ("now", "recall", "retention"),
    [
        (1, 1, 1),  # the same token as before
        (6, 1, 0),  # a token of the step before: it was in the pool
        (3, 0, 0),  # a token that was there all along, and that nobody had carried
    ],
)
def test_one_token_at_a_time(now: int, recall: float, retention: float) -> None:
    found = watched([peaked(5 + STEP, 1), peaked(8 + STEP, now)])
    assert found.recall[0] == pytest.approx(recall)
    assert found.retention[0] == pytest.approx(retention)


def test_own_tokens_are_not_history() -> None:
    scores = peaked(8 + STEP, 8, 9, 10)  # all attention stays in the step
    assert watched([scores]).captured[0] == pytest.approx(0.02 / math.fsum(scores[0, :8].tolist()), rel=0.2)


def test_a_head_that_looks_at_no_history_misses_nothing() -> None:
    found = watched([torch.zeros(HEADS, 8), torch.zeros(HEADS, 11)])
    assert found.captured == (1,) * len(BUDGETS)
    assert found.recall == (1,) * len(BUDGETS)


def test_too_few_steps_say_nothing() -> None:
    found = watched(random_scores(1))
    assert not math.isnan(found.captured[0])
    assert math.isnan(found.recall[0])
    assert math.isnan(found.churn[0])
