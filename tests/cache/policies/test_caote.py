"""Output error: attention and value together."""

from __future__ import annotations

import pytest
import torch

from statekv.cache.policies.caote import Caote
from tests.cache.policies.judging import SHAPE, asked, scores


def drawn(seed: int = 4) -> torch.Tensor:
    return torch.randn(*SHAPE, 4, generator=torch.Generator().manual_seed(seed))


def test_it_is_how_far_the_output_moves_without_a_key() -> None:
    share, values = scores() / scores().sum(-1, keepdim=True), drawn()
    found, whole = asked(Caote(), scores(), values), share[..., None, :] @ values
    for key in (0, 7, 39):
        left = share.clone()
        left[..., key] = 0
        without = (left / left.sum(-1, keepdim=True))[..., None, :] @ values
        moved = torch.linalg.vector_norm(whole - without, dim=-1)[..., 0]
        torch.testing.assert_close(found[..., key], moved, atol=1e-5, rtol=1e-4)


def test_the_scale_of_the_attention_does_not_matter() -> None:
    torch.testing.assert_close(asked(Caote(), 8 * scores(), drawn()), asked(Caote(), scores(), drawn()))


@pytest.mark.parametrize("budget", [1, 7, 30])
def test_where_all_values_are_equally_far_from_the_output_it_is_the_paper(budget: int) -> None:
    """Keys in pairs of equal attention and opposite values: what is mixed is 0, and all are as far from it."""
    halves = scores()[..., :20]
    attention = torch.cat([halves, halves], -1)
    values = torch.nn.functional.normalize(drawn()[..., :20, :], dim=-1)
    found = asked(Caote(), attention, torch.cat([values, -values], -2))
    expected = attention.topk(2 * budget if budget < 20 else 40).values
    best = attention.gather(-1, found.topk(expected.shape[-1]).indices)
    torch.testing.assert_close(best.sort(-1, descending=True).values, expected)


def test_one_value_for_all_is_worth_nothing() -> None:
    assert asked(Caote(), scores(), torch.ones(*SHAPE, 4)).abs().max() < 1e-5


def test_a_key_with_all_the_attention_is_worth_most_and_finite() -> None:
    attention = torch.zeros(SHAPE)
    attention[..., 3] = 1
    values = drawn()
    values[..., 3, :] += 1e-3
    assert asked(Caote(), attention, values).isfinite().all()
