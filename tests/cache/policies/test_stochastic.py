"""Chance among keys of like attention."""

from __future__ import annotations

import pytest
import torch

from statekv.cache.policies.stochastic import Stochastic
from statekv.errors import ConfigError
from statekv.ops import select
from tests.cache.policies.judging import asked, scores


def test_at_temperature_0_it_is_the_paper() -> None:
    assert torch.equal(asked(Stochastic(temperature=0), scores()), scores())


def test_a_low_temperature_keeps_what_the_paper_keeps() -> None:
    found = asked(Stochastic(temperature=1e-6), scores())
    assert torch.equal(select.best(found, 15), select.best(scores(), 15))


def test_odds_are_the_attention() -> None:
    """Of two keys, one with three times the attention of the other, each head keeps one."""
    attention = torch.tensor([0.75, 0.25]).expand(1, 4000, 2)
    share = asked(Stochastic(seed=1), attention).argmax(-1).float().mean()
    assert abs(share - 0.25) < 0.03


def test_each_step_draws_anew_and_a_seed_draws_the_same() -> None:
    first, again, later, other = (
        asked(Stochastic(seed=seed), scores(), first_own=own) for seed, own in ((1, 30), (1, 30), (1, 35), (2, 30))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    assert not torch.equal(first, other)


def test_keys_without_attention_are_never_nan() -> None:
    assert asked(Stochastic(temperature=0.1), torch.zeros(1, 2, 30)).isfinite().all()


@pytest.mark.parametrize("temperature", [-1.0, float("inf"), float("nan")])
def test_a_temperature_outside_its_range_is_refused(temperature: float) -> None:
    with pytest.raises(ConfigError, match="at least 0"):
        Stochastic(temperature=temperature)
