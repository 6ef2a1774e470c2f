"""Codes stand for numbers within half a step, in any range of tokens, and cost what the formula says."""

from __future__ import annotations

import math

import pytest
import torch

from statekv.errors import ConfigError
from statekv.ops.quantise import Quantised, dequantise, quantise, quantised_bytes
from tests.gpu import need_gpu

BITS = pytest.mark.parametrize("bits", [8, 4, 2])
LENGTHS = pytest.mark.parametrize("number", [1, 31, 32, 33, 257])
STREAMS, KV_HEADS, HEAD_DIM = 2, 3, 16


def normal(number: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Tokens whose channels differ in spread and in where they lie, as keys do."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, STREAMS, KV_HEADS, HEAD_DIM)
    spread, middle = torch.randn(2, *shape, generator=generator)
    tokens: torch.Tensor = spread.exp() * torch.randn(number, *shape, generator=generator) + 5 * middle
    return tokens.to(dtype)


def whole(quantised: Quantised, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return dequantise(quantised, 0, len(quantised.codes), dtype)


def by_hand(quantised: Quantised, token: int) -> torch.Tensor:
    """One token, as the docstring of `Quantised` says: [2, streams, kv_heads, head_dim] float32."""
    a_byte, channels = 8 // quantised.bits, quantised.scale.shape[-1]
    found = torch.empty(quantised.scale.shape[1:])
    for channel in range(channels):
        part, byte = divmod(channel, channels // a_byte)
        code = (quantised.codes[token, ..., byte].int() >> part * quantised.bits) % 2**quantised.bits
        scale, zero = (
            kept[token // quantised.group, ..., channel].float() for kept in (quantised.scale, quantised.zero)
        )
        found[..., channel] = zero + code * scale
    return found


@BITS
@LENGTHS
def test_every_number_comes_back_within_half_of_its_scale(bits: int, number: int) -> None:
    tokens = normal(number)
    quantised = quantise(tokens, bits)
    scale = quantised.scale.float().repeat_interleave(32, 0)[:number]
    off = (whole(quantised) - tokens).abs()
    assert (off <= scale * (0.5 + 1e-5) + 1e-6).all()
    if number > 1:
        assert off.max() > scale.min() / 10  # it is not as if nothing had been rounded


@BITS
def test_a_scale_is_as_fine_as_its_group_allows(bits: int) -> None:
    """Without that, half of a scale would say nothing."""
    tokens = normal(64)
    quantised = quantise(tokens, bits)
    grouped = tokens.unflatten(0, (2, 32))
    allowed = (grouped.amax(1) - grouped.amin(1)) / (2**bits - 1)
    # Where a channel lies far from 0, float16 knows its zero no better than that.
    coarse = grouped.amin(1).abs() * 2**-10
    assert (quantised.scale <= torch.maximum(allowed, coarse) * 1.01 + coarse / (2**bits - 1)).all()


@BITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_format_is_as_documented(bits: int, dtype: torch.dtype) -> None:
    quantised = quantise(normal(70, dtype), bits)
    found = whole(quantised)
    for token in (0, 31, 32, 69):
        torch.testing.assert_close(found[token], by_hand(quantised, token), atol=0, rtol=1e-6)
    assert torch.equal(whole(quantised, dtype), found.to(dtype))


@BITS
def test_more_bits_are_nearer(bits: int) -> None:
    """White noise between the ends of a group is off by scale / sqrt(12) on the average."""
    tokens = torch.rand(320, 2, 1, 2, 16, generator=torch.Generator().manual_seed(0))
    off = (whole(quantise(tokens, bits)) - tokens).square().mean().sqrt()
    expected = 31 / 33 / (2**bits - 1) / math.sqrt(12)  # the range of 32 numbers out of 0 … 1
    assert 0.8 * expected < off < 1.2 * expected


@BITS
@LENGTHS
@pytest.mark.parametrize("size", [1e-8, 1e-5, 1e-3, 1, 1e4])
def test_quantising_once_more_changes_nothing(bits: int, number: int, size: float) -> None:
    once = quantise(normal(number) * size, bits)
    twice = quantise(whole(once), bits)
    assert torch.equal(once.codes, twice.codes)
    assert torch.equal(once.scale, twice.scale)
    assert torch.equal(once.zero, twice.zero)


@BITS
@pytest.mark.parametrize("size", [1e-8, 1e-5, 1e-3, 1e2])
def test_small_and_large_numbers_come_back_within_half_of_their_scale(bits: int, size: float) -> None:
    tokens = normal(100) * size
    quantised = quantise(tokens, bits)
    scale = quantised.scale.float().repeat_interleave(32, 0)[:100]
    assert ((whole(quantised) - tokens).abs() <= scale * (0.5 + 1e-4)).all()


@BITS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_channels_that_do_not_change_come_back_exactly(bits: int, dtype: torch.dtype) -> None:
    tokens = normal(1, dtype).expand(50, -1, -1, -1, -1)
    assert torch.equal(whole(quantise(tokens, bits), dtype), tokens)


@BITS
def test_numbers_on_the_grid_come_back_exactly(bits: int) -> None:
    levels = 2**bits
    tokens = (torch.arange(64) * 7 % levels).view(64, 1, 1, 1, 1).expand(64, 2, 1, 1, 8) * 0.25 - 3
    tokens = torch.cat(
        [tokens.new_full((1, 2, 1, 1, 8), -3), tokens, tokens.new_full((1, 2, 1, 1, 8), levels / 4 - 3.25)]
    )
    assert torch.equal(whole(quantise(tokens, bits, group=66)), tokens)


@BITS
@LENGTHS
def test_any_range_of_tokens_is_what_it_is_in_the_whole(bits: int, number: int) -> None:
    quantised = quantise(normal(number), bits)
    found = whole(quantised)
    for start, stop in ((0, 1), (0, number), (number - 1, number), (number // 3, number // 2), (5, 5)):
        assert torch.equal(dequantise(quantised, start, stop, torch.float32), found[start:stop])


def test_a_range_reads_nothing_else() -> None:
    quantised = quantise(normal(96), 4)
    found = whole(quantised)
    quantised.codes[:32], quantised.codes[64:] = 255, 255
    quantised.scale[[0, 2]] = torch.nan
    assert torch.equal(dequantise(quantised, 32, 64, torch.float32), found[32:64])


@BITS
def test_groups_know_nothing_of_each_other(bits: int) -> None:
    """What comes later never changes codes that are there, whole groups taken."""
    tokens = normal(96)
    early, late = quantise(tokens[:64], bits), quantise(tokens, bits)
    assert torch.equal(early.codes, late.codes[:64])
    assert torch.equal(early.scale, late.scale[:2])
    assert torch.equal(early.zero, late.zero[:2])


@BITS
@LENGTHS
@pytest.mark.parametrize("group", [32, 64])
def test_bytes_are_those_of_the_formula(bits: int, number: int, group: int) -> None:
    quantised = quantise(normal(number), bits, group)
    assert quantised.nbytes == quantised_bytes(number, bits, group, STREAMS, KV_HEADS, HEAD_DIM)
    assert quantised.codes.shape == (number, 2, STREAMS, KV_HEADS, HEAD_DIM * bits // 8)
    assert quantised.scale.shape == quantised.zero.shape == (-(-number // group), 2, STREAMS, KV_HEADS, HEAD_DIM)


def test_the_formula_in_numbers() -> None:
    """256 tokens of 4 heads of 128: 32 tokens share 4 bytes, which is one more bit for each number."""
    assert quantised_bytes(256, 4, 32, 1, 4, 128) == 2 * 4 * 128 * 256 * 5 // 8


@BITS
def test_what_float16_cannot_hold_is_cut_off(bits: int) -> None:
    tokens = normal(40)
    tokens[3, 0, 0, 0, :4] = torch.tensor([1e6, -1e6, torch.inf, -torch.inf])
    tokens[7, 0] = tokens[8, 1] = -1e9
    tokens[9] += torch.linspace(64e3, 66e3, tokens[9].numel()).view(tokens[9].shape)
    quantised = quantise(tokens, bits)
    found = whole(quantised)
    assert whole(quantised, torch.float16).isfinite().all()
    expected = tokens.clamp(-65504, 65504)[3, 0, 0, 0, :4]
    torch.testing.assert_close(found[3, 0, 0, 0, :4], expected, atol=0, rtol=2e-3)
    assert torch.equal(found[32:], whole(quantise(tokens[32:], bits)))  # the next group does not hear of it


def test_nan_is_not_hidden() -> None:
    tokens = normal(40)
    tokens[3, 0, 0, 0, 5] = torch.nan
    bad = whole(quantise(tokens, 8)).isnan()
    assert bad[:32, 0, 0, 0, 5].all()
    assert bad.sum() == 32


def test_no_tokens() -> None:
    quantised = quantise(normal(0), 2)
    assert (whole(quantised).shape, quantised.nbytes) == ((0, 2, STREAMS, KV_HEADS, HEAD_DIM), 0)


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(ConfigError, match="bits is 3"):
        quantise(normal(4), 3)
    with pytest.raises(ConfigError, match="6 channels of 2 bits") as caught:
        quantise(torch.zeros(4, 2, 1, 1, 6), 2)
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
@BITS
def test_cuda_gives_the_same_codes(bits: int) -> None:
    """Not run without a GPU."""
    need_gpu()
    tokens = normal(100)
    here, there = quantise(tokens, bits), quantise(tokens.cuda(), bits)
    assert torch.equal(here.codes, there.codes.cpu())
    assert torch.equal(here.scale, there.scale.cpu())
    torch.testing.assert_close(whole(there).cpu(), whole(here), atol=0, rtol=1e-6)
