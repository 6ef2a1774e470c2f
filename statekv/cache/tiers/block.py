"""Steps that have left the newest part of a detailed cache: where each lies, and blocks of them, never changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from statekv.cache.tiers.base import GROUP, Content, Held, Rows, joined, rows_of
from statekv.ops.quantise import Quantised, dequantise, quantise


@dataclass(eq=False, slots=True)
class SegmentEntry:
    """One segment in a detailed cache with a cap.

    Attributes:
        start: number of its first token in the stream.
        kind: a "step" may leave the buffers and may be forgotten; all else stays.
        place: its first token's place in the buffers, while it is there.
        worth: the most that its carried keys have scored when steps were made room for.
        block: what it lies in, once it has left the buffers.
        row: which of the block's steps it is.
        moved: positions that it has moved by since it was sealed.
    """

    start: int
    length: int
    kind: str
    place: int
    worth: float = 0.0
    block: OffloadedBlock | None = None
    row: int = 0
    moved: int = 0

    @property
    def offloaded(self) -> OffloadedBlock:
        """The block of a step that has left the buffers."""
        assert self.block is not None
        return self.block

    @property
    def rank(self) -> tuple[float, int]:
        """Steps with the lowest rank are forgotten first: those that score least, of these the oldest."""
        return self.worth, self.start


def first_of(entries: Iterable[SegmentEntry], tokens: int) -> list[SegmentEntry]:
    """As many of the first ones as have so many tokens in all."""
    found, taken = [], 0
    for entry in entries:
        if taken >= tokens:
            break
        found.append(entry)
        taken += entry.length
    return found


def groups_of(entries: Sequence[SegmentEntry], tokens: int) -> Iterator[list[SegmentEntry]]:
    """All of them, in groups that have so many tokens or lie before something else in the buffers."""
    while entries:
        group = first_of(_side_by_side(entries), tokens)
        yield group
        entries = entries[len(group) :]


def _side_by_side(entries: Sequence[SegmentEntry]) -> Iterator[SegmentEntry]:
    yield entries[0]
    for before, entry in pairwise(entries):
        if entry.place != before.place + before.length:
            return
        yield entry


def pack_block(tokens: Sequence[torch.Tensor], lengths: Sequence[int], bits: int | None) -> list[Content]:
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
    return joined([{"codes": step.codes, "scale": step.scale, "zero": step.zero} for step in steps])


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class OffloadedBlock:
    """A block of whole steps where it lies: what reads it, where each step lies in it, and whether that is in its
    layers' devices.
    """

    held: Held
    rows: list[Rows]
    on_device: bool


def read_steps(
    steps: Sequence[tuple[OffloadedBlock, int]], layer: int, bits: int | None, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Steps of one layer, brought to the device in one copy for each kind of tensor.

    Args:
        steps: blocks, all on the device or none of them, and which step of each.

    Returns:
        [N, 2, streams, kv_heads, head_dim], the steps one behind another.

    Raises:
        StorageError: a step is not as it was written.
    """
    spots = [(offloaded.held, offloaded.rows[number]) for offloaded, number in steps]
    parts = [held.read(layer, rows) for held, rows in spots]
    found = joined(parts) if len(parts) > 1 else parts[0]
    found = {name: tensor.to(device) for name, tensor in found.items()}
    if bits is None:
        return found["tokens"]
    places = rows_of([rows.tokens for _, rows in spots])
    group = torch.cat([torch.arange(rows.tokens) // GROUP + rows.first_group for rows in places]).to(device)
    by_token = Quantised(found["codes"], found["scale"][group], found["zero"][group], bits, 1)
    return dequantise(by_token, 0, len(found["codes"]), dtype)
