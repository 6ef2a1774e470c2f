"""The paper's rule: what the step attended to most."""

from __future__ import annotations

import torch

from tests.cache.policies.judging import kept, scores, token_ids


def test_attention_is_the_highest_scores() -> None:
    expected = token_ids().gather(-1, scores().topk(15).indices).sort(-1).values
    assert torch.equal(kept("attention", token_ids(), 15), expected)
