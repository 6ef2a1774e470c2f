"""Streams that never end: tokens are numbered on, and what is kept of them stays as much as it was."""

from __future__ import annotations

import pytest
import torch

from tests.cache.test_carried import carried, random_scores

FAR = 2**31 - 60  # tokens


@pytest.mark.parametrize("carry", ["attention", "recent", "sink_recent"])
def test_a_stream_goes_on_beyond_int32(carry: str) -> None:
    """What is kept does not depend on how many tokens have come before; sinks and a pinned prefix stay for ever."""
    far, near = (carried(20, carry, pinned=2) for _ in range(2))
    for number in range(30):
        if number == 4:  # a few billion tokens pass
            far.detailed.away += FAR
        fresh = torch.randn(3, 2, 1, 2, 5, 4, generator=torch.Generator().manual_seed(number))
        for cache in (far, near):
            cache.pin_from(cache.detailed.length + 3)
            cache.open_slots(5)
            for layer in range(3):
                cache.update(*fresh[layer], layer)
                cache.evict(layer, random_scores(cache, layer, number))
        for layer in range(3):
            tokens = near.kept(layer)
            assert torch.equal(far.kept(layer), tokens.long() + FAR * (tokens >= 20))
            mine, its = (cache.buffers[layer][..., : cache.lengths[layer], :] for cache in (far, near))
            assert torch.equal(mine, its)
    assert far.detailed.length > 2**31
    assert {ids.dtype for ids in near.token_ids} == {torch.int32}
    assert torch.equal(far.fork(far.detailed).kept(1), far.kept(1))
