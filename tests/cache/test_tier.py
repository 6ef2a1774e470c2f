"""What a tier takes in comes out as it was, and takes the bytes that were said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from statekv.cache.disk import DiskTier
from statekv.cache.sealed import only, rows_of, seal
from statekv.cache.tier import Content, DeviceTier, HostTier, Tier
from tests.cache.test_sealed import tokens_of
from tests.cache.tokens import geometry
from tests.gpu import need_gpu

LENGTHS = [33, 4, 70]
G = geometry(streams=2, dtype=torch.bfloat16)
TIERS: dict[str, Callable[[Path], Tier]] = {
    "device": lambda folder: DeviceTier(G.devices),
    "host": lambda folder: HostTier(),
    "disk": lambda folder: DiskTier(folder),
}


def content(bits: int | None) -> list[Content]:
    return seal(tokens_of(G, sum(LENGTHS)), LENGTHS, bits)


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
    held = tier.put(block)
    assert tier.name == name
    assert held.nbytes == tier.size(block)
    check_equal(held.content(), block)
    for layer in range(G.layers):
        for key, tensor in block[layer].items():
            for start, stop in ((0, len(tensor)), (1, 2), (len(tensor) - 1, len(tensor))):
                assert torch.equal(held.read(layer, key, start, stop), tensor[start:stop])


@pytest.mark.parametrize("bits", [None, 4])
def test_blocks_go_down_from_tier_to_tier_as_they_are(bits: int | None, tmp_path: Path) -> None:
    held: Sequence[Content] = content(bits)
    for name in TIERS:
        held = TIERS[name](tmp_path).put(held).content()
    check_equal(held, content(bits))


@pytest.mark.parametrize("bits", [None, 4])
def test_in_memory_a_block_takes_what_its_tensors_take(bits: int | None) -> None:
    block = content(bits)
    for tier in (DeviceTier(G.devices), HostTier()):
        assert tier.size(block) == sum(t.nbytes for layer in block for t in layer.values())


def test_a_block_is_one_piece_of_memory_and_a_copy() -> None:
    block = content(4)
    for tier in (DeviceTier(G.devices), HostTier()):
        held = tier.put(block).content()
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
    held = host.put(block)
    for layer in block:
        for tensor in layer.values():
            tensor.zero_()
    check_equal(held.content(), expected)
    assert all(tensor.is_pinned() for layer in held.content() for tensor in layer.values())
    thinned = host.put(only(held.content(), rows_of(LENGTHS), [0, 2]))
    assert all(tensor.is_pinned() for layer in thinned.content() for tensor in layer.values())
    back = DeviceTier((torch.device("cuda"),) * G.layers).put(held.content())
    check_equal(back.content(), expected)
    assert back.content()[0]["codes"].is_cuda
