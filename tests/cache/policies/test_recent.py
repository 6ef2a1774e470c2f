"""The newest tokens, with the first of the stream or without."""

from __future__ import annotations

import pytest
import torch

from tests.cache.policies.judging import SHAPE, kept, token_ids


@pytest.mark.parametrize("budget", [1, 8, 15, 40])
def test_recent_is_exactly_the_newest(budget: int) -> None:
    assert torch.equal(kept("recent", token_ids(), budget), token_ids().sort(-1).values[..., -budget:])


@pytest.mark.parametrize(("budget", "sinks"), [(15, 0), (15, 4), (15, 14), (5, 4)])
def test_sink_recent_is_the_sinks_and_the_newest(budget: int, sinks: int) -> None:
    tokens = torch.arange(40, dtype=torch.int32).expand(SHAPE)
    expected = [*range(sinks), *range(40 - (budget - sinks), 40)]
    assert (kept("sink_recent", tokens, budget, sinks=sinks) == torch.tensor(expected)).all()


@pytest.mark.parametrize("carry", ["recent", "sink_recent"])
@pytest.mark.parametrize("passed", [2**24, 2**31, 2**40])
def test_long_streams_still_tell_neighbours_apart(carry: str, passed: int) -> None:
    """Numbers in float32 would not."""
    slots = token_ids().long() + passed
    assert torch.equal(kept(carry, slots, 15, sinks=4), slots.sort(-1).values[..., -15:])
