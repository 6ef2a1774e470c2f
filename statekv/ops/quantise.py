"""Keys and values in 8, 4 or 2 bits: between the least and the greatest of each channel, group by group of tokens.

Both are quantised along tokens: within a channel of a head they resemble each other from one token to the next, while
values that share a scale with the other channels of their token lose (VidKV, arXiv 2503.16257, table 1: 47.68 against
43.63). Tokens are quantised once. Quantising what was quantised changes nothing here, but where another group begins
it would lose again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from statekv.errors import ConfigError

_LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Quantised:
    """Tokens as codes: a channel of a token is `zero + code · scale`, of the group that the token is in.

    Attributes:
        codes: [N, 2, streams, kv_heads, head_dim · bits / 8] uint8. With n = 8 / bits codes in a byte, byte j holds
            channels j, j + head_dim / n, …, the first one in the lowest bits.
        scale, zero: [ceil(N / group), 2, streams, kv_heads, head_dim] float16.
        bits: of a code.
        group: consecutive tokens that share scale and zero, from the first token on.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    bits: int
    group: int

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zeros."""
        return self.codes.nbytes + self.scale.nbytes + self.zero.nbytes


def quantise(tokens: torch.Tensor, bits: int, group: int = 32) -> Quantised:
    """Quantise keys and values, so that each comes back within half of its scale.

    Codes are chosen for scale and zero as float16 holds them. A scale is no finer than float16 knows its zero, nor than
    (2^bits - 1) · 2^-24: below that float16's rounding of the scale itself would add up to more than half a step. So
    the least of a group always has code 0, the same tokens give the same codes once more, and a channel that does not
    change comes back as float16 has it.

    Args:
        tokens: [N, 2, streams, kv_heads, head_dim], keys and values. What is beyond ±65504, the largest number of
            float16, becomes that. A NaN makes its channel NaN in the whole group.
        bits: 8, 4 or 2.
        group: tokens that share a scale; the last group may have fewer.

    Raises:
        ConfigError: there are no such codes, or the channels of a head do not fill whole bytes.
    """
    number, *_, head_dim = tokens.shape
    if bits not in (8, 4, 2):
        raise ConfigError(f"bits is {bits}, which is none of 8, 4 and 2", "choose one of these")
    if head_dim * bits % 8:
        raise ConfigError(f"{head_dim} channels of {bits} bits do not fill whole bytes", "choose 8 bits")
    levels = 2**bits - 1
    groups = -(-number // group)
    padded = torch.cat([tokens, tokens[-1:].expand(groups * group - number, *tokens.shape[1:])])
    grouped = padded.float().clamp(-_LARGEST, _LARGEST).unflatten(0, (groups, group))  # [groups, group, 2, S, KV, D]
    zero = grouped.amin(1).half()
    least = (zero.float().abs() * 2**-10).clamp(min=levels * 2**-24)
    scale = ((grouped.amax(1) - zero.float()) / levels).maximum(least).half()
    codes = grouped.sub_(zero.float()[:, None]).div_(scale.float()[:, None]).round_().clamp_(0, levels)
    return Quantised(_packed(codes.flatten(0, 1)[:number].to(torch.uint8), bits), scale, zero, bits, group)


def dequantise(quantised: Quantised, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
    """[stop - start, 2, streams, kv_heads, head_dim] of a dtype, rounded to it once: tokens `start` to `stop`; the
    others are not touched.
    """
    codes = _unpacked(quantised.codes[start:stop], quantised.bits)
    group = torch.arange(start, stop, device=codes.device) // quantised.group
    scale, zero = (part.index_select(0, group).float() for part in (quantised.scale, quantised.zero))
    # A rounded scale may lead beyond the largest number of float16, where that would be infinity.
    return torch.addcmul(zero, codes.float(), scale).clamp_(-_LARGEST, _LARGEST).to(dtype)


def quantised_bytes(tokens: int, bits: int, group: int, streams: int, kv_heads: int, head_dim: int) -> int:
    """Bytes that so many quantised tokens of one layer take: codes, and 4 bytes for each channel of each group."""
    channels = 2 * streams * kv_heads * head_dim
    return channels * tokens * bits // 8 + channels * -(-tokens // group) * 4


def _packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    parts = codes.unflatten(-1, (8 // bits, -1))  # [..., n, D / n]
    packed: torch.Tensor = (parts << _shifts(bits, codes.device)).sum(-2, dtype=torch.uint8)
    return packed


def _unpacked(codes: torch.Tensor, bits: int) -> torch.Tensor:
    parts = (codes[..., None, :] >> _shifts(bits, codes.device)).bitwise_and(2**bits - 1)  # [..., n, D / n]
    unpacked: torch.Tensor = parts.flatten(-2)
    return unpacked


def _shifts(bits: int, device: torch.device) -> torch.Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device)[:, None]
