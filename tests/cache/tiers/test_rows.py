"""A step's part of a block is the same whatever lies beside it."""

from __future__ import annotations

import torch

from statekv.cache.tiers.rows import only, rows_of
from statekv.cache.tiers.sealed import seal
from tests.cache.tiers.test_sealed import BITS, LENGTHS, SUBSETS, tokens_of
from tests.cache.tokens import geometry


@BITS
@SUBSETS
def test_those_that_stay_keep_their_bits(bits: int | None, kept: list[int]) -> None:
    """As if they had been sealed alone, in memory of their own."""
    g = geometry(dtype=torch.bfloat16)
    tokens = tokens_of(g, sum(LENGTHS))
    thinned = only(seal(tokens, LENGTHS, bits), rows_of(LENGTHS), kept)
    apart = [torch.cat([layer.split(LENGTHS, dim=-2)[number] for number in kept], dim=-2) for layer in tokens]
    alone = seal(apart, [LENGTHS[number] for number in kept], bits)
    for mine, its in zip(thinned, alone, strict=True):
        assert mine.keys() == its.keys()
        assert all(torch.equal(mine[name], its[name]) for name in mine)
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in mine.values())


def test_rows_and_groups_lie_one_behind_another() -> None:
    rows = rows_of(LENGTHS)
    assert [(each.first, each.last) for each in rows] == [(0, 7), (7, 71), (71, 72), (72, 105), (105, 137), (137, 187)]
    assert [(each.first_group, each.last_group) for each in rows] == [(0, 1), (1, 3), (3, 4), (4, 6), (6, 7), (7, 9)]
