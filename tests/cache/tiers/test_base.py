"""What a tier takes in comes out as it was, and takes the bytes that were said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from statekv.cache.tiers.base import Content, DeviceTier, HostTier, Tier, only, rows_of
from statekv.cache.tiers.block import pack_block
from statekv.cache.tiers.disk import DiskTier
from tests.cache.tiers.test_block import BITS, SUBSETS, tokens_of
from tests.cache.tiers.test_block import LENGTHS as SIX
from tests.cache.tokens import kv_spec
from tests.gpu import need_gpu

LENGTHS = [33, 4, 70]
ROWS = rows_of(LENGTHS)
G = kv_spec(streams=2, dtype=torch.bfloat16)
TIERS: dict[str, Callable[[Path], Tier]] = {
    "device": lambda folder: DeviceTier(G.devices),
    "host": lambda folder: HostTier(),
    "disk": lambda folder: DiskTier(folder),
}


def content(bits: int | None) -> list[Content]:
    return pack_block(tokens_of(G, sum(LENGTHS)), LENGTHS, bits)


def check_equal(found: Sequence[Content], expected: Sequence[Content]) -> None:
    assert len(found) == len(expected)
    for mine, its in zip(found, expected, strict=True):
        assert mine.keys() == its.keys()
        for name, tensor in its.items():
            assert mine[name].dtype == tensor.dtype
            assert torch.equal(mine[name].cpu(), tensor.cpu())


@pytest.mark.parametrize("bits", [None, 8, 2])
@pytest.mark.parametrize("name", TIERS)
def test_comes_out_as_it_went_in(name: str, bits: int | None, tmp_path: Path) -> None:
    tier, block = TIERS[name](tmp_path), content(bits)
    held = tier.put(block, ROWS)
    assert tier.name == name
    assert held.nbytes == tier.size(block)
    check_equal(held.content(), block)
    for rows in ROWS:
        check_equal([held.read(layer, rows) for layer in range(G.layers)], [rows.of(layer) for layer in block])


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("name", TIERS)
def test_thinned_it_holds_the_others_and_the_first_one_stays_as_it_is(
    name: str, bits: int | None, tmp_path: Path
) -> None:
    tier, block = TIERS[name](tmp_path), content(bits)
    held = tier.put(block, ROWS)
    thinned = tier.thin(held, ROWS, [0, 2])
    expected = only(block, ROWS, [0, 2])
    check_equal(thinned.content(), expected)
    assert thinned.nbytes == tier.size(expected)
    for rows in rows_of([LENGTHS[0], LENGTHS[2]]):
        check_equal([thinned.read(layer, rows) for layer in range(G.layers)], [rows.of(layer) for layer in expected])
    check_equal(held.content(), block)
    del held
    check_equal(thinned.content(), expected)


@pytest.mark.parametrize("bits", [None, 4])
def test_blocks_go_down_from_tier_to_tier_as_they_are(bits: int | None, tmp_path: Path) -> None:
    held: Sequence[Content] = content(bits)
    for name in TIERS:
        held = TIERS[name](tmp_path).put(held, ROWS).content()
    check_equal(held, content(bits))


@pytest.mark.parametrize("bits", [None, 4])
def test_a_block_takes_what_its_tensors_take(bits: int | None, tmp_path: Path) -> None:
    block = content(bits)
    for tier in (make(tmp_path) for make in TIERS.values()):
        assert tier.size(block) == sum(t.nbytes for layer in block for t in layer.values())


def test_a_block_is_one_piece_of_memory_and_a_copy() -> None:
    block = content(4)
    for tier in (DeviceTier(G.devices), HostTier()):
        held = tier.put(block, ROWS).content()
        places = {tensor.untyped_storage().data_ptr() for layer in held for tensor in layer.values()}
        assert len(places) == 1
        assert not places & {tensor.untyped_storage().data_ptr() for layer in block for tensor in layer.values()}


@pytest.mark.gpu
def test_from_cuda_to_pinned_memory_and_back() -> None:
    """Not run without a GPU. The source may be overwritten as soon as `put` returns."""
    need_gpu()
    expected = content(4)
    block = [{name: tensor.cuda() for name, tensor in layer.items()} for layer in expected]
    host = HostTier(pinned=True)
    held = host.put(block, ROWS)
    for layer in block:
        for tensor in layer.values():
            tensor.zero_()
    check_equal(held.content(), expected)
    assert all(tensor.is_pinned() for layer in held.content() for tensor in layer.values())
    thinned = host.thin(held, ROWS, [0, 2])
    assert all(tensor.is_pinned() for layer in thinned.content() for tensor in layer.values())
    back = DeviceTier((torch.device("cuda"),) * G.layers).put(held.content(), ROWS)
    check_equal(back.content(), expected)
    assert back.content()[0]["codes"].is_cuda


@BITS
@SUBSETS
def test_those_that_stay_keep_their_bits(bits: int | None, kept: list[int]) -> None:
    """As if they had been sealed alone, in memory of their own."""
    g = kv_spec(dtype=torch.bfloat16)
    tokens = tokens_of(g, sum(SIX))
    thinned = only(pack_block(tokens, SIX, bits), rows_of(SIX), kept)
    apart = [torch.cat([layer.split(SIX, dim=-2)[number] for number in kept], dim=-2) for layer in tokens]
    alone = pack_block(apart, [SIX[number] for number in kept], bits)
    for mine, its in zip(thinned, alone, strict=True):
        assert mine.keys() == its.keys()
        assert all(torch.equal(mine[name], its[name]) for name in mine)
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in mine.values())


def test_rows_and_groups_lie_one_behind_another() -> None:
    rows = rows_of(SIX)
    assert [(each.first, each.last) for each in rows] == [(0, 7), (7, 71), (71, 72), (72, 105), (105, 137), (137, 187)]
    assert [(each.first_group, each.last_group) for each in rows] == [(0, 1), (1, 3), (3, 4), (4, 6), (6, 7), (7, 9)]
