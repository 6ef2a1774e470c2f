"""Whole steps that have left the newest part of a detailed cache: written once, never changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from statekv.cache.tier import Content, Held
from statekv.ops.quantise import Quantised, dequantise, quantise

GROUP = 32  # tokens that share a scale and a zero


@dataclass(frozen=True, slots=True)
class Rows:
    """Where one step lies in a block: its tokens, and its groups where they are quantised."""

    first: int
    tokens: int
    first_group: int

    @property
    def last(self) -> int:
        """One past its last token."""
        return self.first + self.tokens

    @property
    def last_group(self) -> int:
        """One past its last group."""
        return self.first_group + -(-self.tokens // GROUP)


def seal(tokens: Sequence[torch.Tensor], lengths: Sequence[int], bits: int | None) -> list[Content]:
    """A block's content, layer by layer.

    Args:
        tokens: of each layer [2, streams, kv_heads, N, head_dim], keys and values.
        lengths: tokens of each step, N in all. Steps are quantised one by one, so that each can be read alone, and
            forgotten alone.
        bits: 8, 4, 2, or None to keep them as they are.

    Returns:
        Of each layer "tokens" [N, 2, streams, kv_heads, head_dim], or "codes" uint8, "scale" and "zero" float16 as
        in `ops.quantise`, the steps' one behind another. Tokens come first, so that a step is one piece of memory.
    """
    return [_content(layer.permute(3, 0, 1, 2, 4).contiguous(), lengths, bits) for layer in tokens]


def _content(tokens: torch.Tensor, lengths: Sequence[int], bits: int | None) -> Content:
    if bits is None:
        return {"tokens": tokens}
    steps = [quantise(step, bits, GROUP) for step in tokens.split(list(lengths))]
    return {
        "codes": torch.cat([step.codes for step in steps]),
        "scale": torch.cat([step.scale for step in steps]),
        "zero": torch.cat([step.zero for step in steps]),
    }


def rows_of(lengths: Sequence[int]) -> list[Rows]:
    """Where steps of these lengths lie in their block."""
    found, first, group = [], 0, 0
    for length in lengths:
        found.append(Rows(first, length, group))
        first, group = found[-1].last, found[-1].last_group
    return found


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class Sealed:
    """A block of whole steps where it lies.

    Attributes:
        held: what knows how to read it.
        rows: where each step lies in it.
        on_device: whether that is in its layers' devices.
    """

    held: Held
    rows: list[Rows]
    on_device: bool


def read_steps(
    steps: Sequence[tuple[Sealed, int]], layer: int, bits: int | None, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Steps of one layer, brought to the device in one copy for each kind of tensor.

    Args:
        steps: blocks, all on the device or none of them, and which step of each.
        layer: index of the layer.
        bits: of all blocks.
        device, dtype: of the result.

    Returns:
        [N, 2, streams, kv_heads, head_dim], the steps one behind another.

    Raises:
        StorageError: a block is not as it was written.
    """
    spots = [(sealed.held, sealed.rows[number]) for sealed, number in steps]
    if bits is None:
        return _joined([held.read(layer, "tokens", rows.first, rows.last) for held, rows in spots], device)
    codes = _joined([held.read(layer, "codes", rows.first, rows.last) for held, rows in spots], device)
    scale, zero = (
        _joined([held.read(layer, name, rows.first_group, rows.last_group) for held, rows in spots], device)
        for name in ("scale", "zero")
    )
    joined = rows_of([rows.tokens for _, rows in spots])
    group = torch.cat([torch.arange(rows.tokens) // GROUP + rows.first_group for rows in joined]).to(device)
    by_token = Quantised(codes, scale[group], zero[group], bits, 1)
    return dequantise(by_token, 0, len(codes), dtype)


def _joined(parts: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    return (torch.cat(parts) if len(parts) > 1 else parts[0]).to(device)


def only(content: Sequence[Content], rows: Sequence[Rows], kept: Sequence[int]) -> list[Content]:
    """A block's content with some of its steps alone; these are as they were, to the bit."""
    return [
        {name: torch.cat([_part(name, tensor, rows[number]) for number in kept]) for name, tensor in layer.items()}
        for layer in content
    ]


def _part(name: str, tensor: torch.Tensor, rows: Rows) -> torch.Tensor:
    by_token = name in ("tokens", "codes")
    return tensor[rows.first : rows.last] if by_token else tensor[rows.first_group : rows.last_group]
