"""Keys of small norm, one choice for all heads."""

from __future__ import annotations

import torch

from statekv.cache.policies import Candidates
from statekv.cache.policies.key_norm import KeyNorm
from tests.cache.policies.judging import SHAPE, token_ids


def judged(keys: torch.Tensor) -> torch.Tensor:
    return KeyNorm().score(Candidates(0, 15, keys, keys, token_ids()))


def test_the_shortest_keys_of_all_heads_together_stay() -> None:
    keys = torch.ones(*SHAPE, 4)
    keys[:, 0, 7], keys[:, 1, 8] = 0.1, 0.5
    found = judged(keys)
    assert found.topk(2).indices.tolist() == [[[7, 8]] * 3] * 2
    assert torch.equal(found, found[:, :1].expand(SHAPE))


def test_neither_sign_nor_half_precision_of_large_keys_matters() -> None:
    keys = torch.randn(*SHAPE, 4, generator=torch.Generator().manual_seed(1)) * 1e4  # squares pass float16's range
    assert torch.equal(judged(keys), judged(-keys))
    assert judged(keys.half()).isfinite().all()
