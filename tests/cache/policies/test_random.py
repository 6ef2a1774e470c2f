"""A uniform sample of the stream, drawn by a token's number."""

from __future__ import annotations

import torch

from statekv.cache.policies.random import lots
from tests.cache.policies.judging import judge, scores, token_ids
from tests.cache.tokens import policy
from tests.method.byhand import lot


def test_lots_are_those_of_splitmix64_for_numbers_and_draws_of_any_size() -> None:
    for token in (0, 7, 2**31 - 1, 2**31, 2**33 + 5):
        for draw in (0, 9, 2**31 - 1, 2**31, 2**33 + 5):
            slots = torch.full((1, 3, 1), token)
            expected = [lot(token, 2, head, 5, draw) / 2**53 for head in range(3)]
            assert lots(slots, 5, 2, draw).flatten().tolist() == expected
            assert lots(slots, 5, 2, torch.tensor([[[draw]]])).flatten().tolist() == expected
            if token < 2**31:
                assert lots(slots.int(), 5, 2, draw).flatten().tolist() == expected


def test_random_repeats_itself_with_its_seed() -> None:
    def draw(seed: int) -> torch.Tensor:
        return torch.stack([judge(policy("random", seed=seed), token_ids()) for _ in range(3)])

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_random_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    judge(policy("random"), token_ids())
    assert torch.equal(torch.rand(4), expected)


def test_random_ignores_the_scores() -> None:
    drawn = policy("random", seed=3)
    assert torch.equal(judge(drawn, token_ids(), scores(1)), judge(drawn, token_ids()))
