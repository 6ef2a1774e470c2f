"""Every step of a block reads back alone, in any company, as it was sealed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from statekv.cache.spec import KVSpec
from statekv.cache.tiers.base import GROUP, HostTier, rows_of
from statekv.cache.tiers.block import OffloadedBlock, pack_block, read_steps
from statekv.ops.quantise import dequantise, quantise
from tests.cache.tokens import CPU, kv_spec

LENGTHS = [7, 64, 1, 33, 32, 50]
BITS = pytest.mark.parametrize("bits", [None, 8, 4, 2])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
SUBSETS = pytest.mark.parametrize("kept", [[0], [2], [5], [0, 1], [1, 3, 4], [2, 5], [0, 1, 2, 3, 4, 5]], ids=str)


def tokens_of(g: KVSpec, number: int, seed: int = 0) -> list[torch.Tensor]:
    """Of each layer [2, streams, kv_heads, N, head_dim], a part of a longer buffer as in a detailed cache."""
    generator = torch.Generator().manual_seed(seed)
    shape = (g.layers, 2, g.streams, g.kv_heads, number + 9, g.head_dim)
    return list(torch.randn(shape, generator=generator).to(g.dtype)[..., 4 : 4 + number, :])


def by_token(layer: torch.Tensor, lengths: Sequence[int]) -> list[torch.Tensor]:
    """Of each step [N, 2, streams, kv_heads, head_dim]."""
    return list(layer.permute(3, 0, 1, 2, 4).split(list(lengths)))


def expected(step: torch.Tensor, bits: int | None) -> torch.Tensor:
    """What a step is good for once it was sealed."""
    return step if bits is None else dequantise(quantise(step, bits, GROUP), 0, len(step), step.dtype)


@BITS
@DTYPES
@SUBSETS
def test_any_steps_read_back_as_they_were_sealed(bits: int | None, dtype: torch.dtype, kept: list[int]) -> None:
    g = kv_spec(streams=2, dtype=dtype)
    tokens = tokens_of(g, sum(LENGTHS))
    block = OffloadedBlock(
        HostTier().put(pack_block(tokens, LENGTHS, bits), rows_of(LENGTHS)), rows_of(LENGTHS), on_device=True
    )
    for layer in range(g.layers):
        steps = by_token(tokens[layer], LENGTHS)
        found = read_steps([(block, number) for number in kept], layer, bits, CPU, dtype)
        assert found.dtype == dtype
        assert torch.equal(found, torch.cat([expected(steps[number], bits) for number in kept]))


@BITS
def test_steps_of_several_blocks_read_back_in_the_order_asked_for(bits: int | None) -> None:
    g = kv_spec()
    lengths = [[33, 5], [40], [2, 31, 64]]
    tokens = [tokens_of(g, sum(each), seed) for seed, each in enumerate(lengths)]
    blocks = [
        OffloadedBlock(HostTier().put(pack_block(held, each, bits), rows_of(each)), rows_of(each), True)
        for held, each in zip(tokens, lengths, strict=True)
    ]
    spots = [(2, 1), (0, 0), (1, 0), (2, 2), (0, 1)]
    found = read_steps([(blocks[block], row) for block, row in spots], 1, bits, CPU, g.dtype)
    steps = [by_token(held[1], each) for held, each in zip(tokens, lengths, strict=True)]
    assert torch.equal(found, torch.cat([expected(steps[block][row], bits) for block, row in spots]))


@BITS
def test_a_block_is_a_copy_and_nothing_else_stays_alive_with_it(bits: int | None) -> None:
    g = kv_spec()
    tokens = tokens_of(g, sum(LENGTHS))
    before = pack_block([layer.clone() for layer in tokens], LENGTHS, bits)
    content = pack_block(tokens, LENGTHS, bits)
    for layer in tokens:
        layer.zero_()  # the buffers are used again
    for mine, its in zip(content, before, strict=True):
        assert all(torch.equal(mine[name], its[name]) for name in its)
    assert HostTier().size(content) == sum(t.untyped_storage().nbytes() for layer in content for t in layer.values())
