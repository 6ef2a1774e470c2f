"""Kept keys stand for dropped ones, so that sums over the whole past are right on average."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from statekv.cache.policies import Candidates
from statekv.cache.policies.weighted import Weighted
from statekv.errors import ConfigError
from statekv.ops import select
from tests.cache.policies.judging import asked, scores

HEADS, OWN, BUDGET = 3000, 8, 12
UNCAPPED = Weighted(cap=float("inf"), output_error=False, seed=2)
BY_ATTENTION = Weighted(output_error=False, seed=1)


def sampled(judged: Weighted, worth: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What is left of a stream, in each of many heads that draw for themselves.

    Args:
        worth: what a query gives each token, [tokens]; its attention is that times how many keys it stands for.

    Returns:
        Numbers [1, heads, budget] and log weights of the keys that stay.
    """
    held = torch.empty(1, HEADS, 0, dtype=torch.int32)
    logs = torch.empty(1, HEADS, 0)
    for step in range(steps):
        own = torch.arange(step * OWN, (step + 1) * OWN, dtype=torch.int32)
        held = torch.cat([held, own.expand(1, HEADS, OWN)], -1)
        logs = torch.cat([logs, torch.zeros(1, HEADS, OWN)], -1)
        seen_by = ((step + 1) * OWN - held).clamp_max(OWN)
        attention = worth[held.long()] * logs.exp() * seen_by
        blank = torch.zeros(*held.shape, 1)
        given = Candidates(0, BUDGET, blank, blank, held, attention, step * OWN, state={"log_weights": logs})
        found = judged.score(given)
        if held.shape[-1] <= BUDGET:
            continue
        kept = select.best(found, BUDGET)
        logs = judged.log_weights(given, found, kept)[kept].view(1, HEADS, BUDGET)
        held = held[kept].view(1, HEADS, BUDGET)
    return held, logs


def uneven(tokens: int) -> torch.Tensor:
    return torch.rand(tokens, generator=torch.Generator().manual_seed(3)).pow(4) + 1e-3


@pytest.mark.parametrize("steps", [2, 6])
@pytest.mark.parametrize("worth", [torch.ones, uneven])
def test_sums_over_all_tokens_are_right_on_average(worth: Callable[[int], torch.Tensor], steps: int) -> None:
    """Of what attention runs over, and of any share of it, such as one coordinate of the values."""
    each = worth(steps * OWN)
    held, logs = sampled(UNCAPPED, each, steps)
    share = torch.randn(steps * OWN, generator=torch.Generator().manual_seed(4))
    for summed in (each, each * share, each * (torch.arange(steps * OWN) < OWN)):
        found = (summed[held.long()] * logs.exp()).sum(-1)[0].double()
        error = found.std() / HEADS**0.5
        assert abs(found.mean() - summed.sum()) < 4 * error + 1e-6
        assert error < 0.05 * each.sum()


def test_equal_keys_get_equal_weights_that_add_up() -> None:
    """A head that looks at all of n keys alike mixes the values of a uniform sample, as of n."""
    found = sampled(UNCAPPED, torch.ones(2 * OWN), 2)[1].exp()
    assert (found.std(-1) < 1e-6).all()
    held, logs = sampled(UNCAPPED, torch.ones(6 * OWN), 6)
    share = logs.softmax(-1) @ torch.ones(BUDGET)
    torch.testing.assert_close(share, torch.ones_like(share))
    counts = torch.bincount(held.flatten().long(), minlength=6 * OWN) / HEADS
    assert counts.min() > 0.1
    assert counts.max() < 0.4  # 12 of 48: a quarter each, for early tokens as for late ones


def test_keys_of_very_different_attention_are_the_papers_and_weigh_nothing_more() -> None:
    attention = torch.logspace(0, -30, 11)[torch.randperm(11, generator=torch.Generator().manual_seed(1))]
    shape = (1, 4, 11)
    blank, slots = torch.zeros(*shape, 1), torch.arange(11, dtype=torch.int32).expand(shape)
    state = {"log_weights": torch.zeros(shape)}
    given = Candidates(0, 5, blank, blank, slots, attention.expand(shape), 10, state=state)
    found = BY_ATTENTION.score(given)
    kept = select.best(found, 5)
    assert torch.equal(kept, select.best(attention.expand(shape), 5))
    assert torch.equal(BY_ATTENTION.log_weights(given, found, kept)[kept], torch.zeros(20))


@pytest.mark.parametrize("cap", [0.0, 0.5, 2.0])
def test_no_weight_is_above_the_cap(cap: float) -> None:
    _, logs = sampled(Weighted(cap=cap, output_error=False, seed=2), uneven(48), 6)
    assert logs.max() == pytest.approx(cap)
    assert logs.min() >= 0
    same = sampled(UNCAPPED, uneven(16), 2)[0]
    assert torch.equal(
        sampled(Weighted(cap=cap, output_error=False, seed=2), uneven(16), 2)[0], same
    )  # the first draw knows no weights


def test_what_stays_whatever_its_size_stands_for_itself() -> None:
    blank, slots = torch.zeros(2, 3, 40, 4), torch.arange(40, dtype=torch.int32).expand(2, 3, 40)
    state = {"log_weights": torch.full((2, 3, 40), 0.25)}
    given = Candidates(0, 15, blank, blank, slots, scores(), 35, state=state)
    pinned = UNCAPPED.score(given).masked_fill(given.token_ids < 4, float("inf"))
    found = UNCAPPED.log_weights(given, pinned, select.best(pinned, 15))
    assert torch.equal(found[..., :4], torch.full((2, 3, 4), 0.25))
    assert found.max() > 0.25


def test_a_steps_last_tokens_are_not_starved_for_being_seen_by_few() -> None:
    attention = torch.tensor([8.0, 8, 8, 7, 6, 5, 4, 3, 2, 1]).expand(1, 2, 10)  # a step of 8, one from each query
    blank, slots = torch.zeros(1, 2, 10, 1), torch.arange(10).expand(1, 2, 10)
    sizes = UNCAPPED._sizes(Candidates(0, 4, blank, blank, slots, attention, 2))
    assert torch.equal(sizes, torch.ones(1, 2, 10, dtype=torch.float64))


def test_attention_of_0_is_no_nan() -> None:
    given = torch.zeros(1, 2, 20)
    state = {"log_weights": torch.zeros(1, 2, 20)}
    assert asked(UNCAPPED, given, first_own=15, state=state).isfinite().all()


@pytest.mark.parametrize("cap", [-1.0, float("nan")])
def test_a_cap_below_0_is_refused(cap: float) -> None:
    with pytest.raises(ConfigError, match="at least 0"):
        Weighted(cap=cap)
