"""What all caches of a stream share: sizes of a model's keys, memory in one piece, spans and moves of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_NARROW = 2**31 - 2**24  # tokens: what comes next, less than 2^24 at once, is still below 2^31

# What a reducer remembers of a stream: tensors, and what JSON holds, by name. Nobody changes one that a stream holds.
Memory = Mapping[str, Any]


@dataclass(frozen=True)
class KVSpec:
    """Attributes:
    kv_heads, head_dim: of one layer's keys.
    dtype: of keys and values.
    devices: where each layer's keys live; its length is the number of layers.
    streams: streams stepped together.
    """

    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    devices: tuple[torch.device, ...]
    streams: int = 1

    @property
    def layers(self) -> int:
        return len(self.devices)

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of one token in all layers and heads of one stream."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Span:
    """Where a segment lies in the detailed cache, and when it was: `pts_seconds` is None for text alone.

    `position` is where it would begin on the axis of time if nothing had ever been compacted.
    """

    kind: str
    start: int
    length: int
    pts_seconds: float | None
    position: int


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment of a stream that `StreamState.crop_to` can return to."""

    tokens: int
    position: int
    carried: int
    frames: int
    origin_seconds: float | None
    memories: Mapping[str, Memory]
    words: frozenset[int]
    pairs: tuple[int, int]


@dataclass(frozen=True)
class PositionShift:
    """Steps move as a whole, so a token moves as far as the last step that begins at it or before.

    Attributes:
        starts: number of each moving step's first token in the stream, ascending.
        by: positions that it moves by.
    """

    starts: Sequence[int]
    by: Sequence[int]

    def of(self, tokens: torch.Tensor) -> torch.Tensor:
        """How far tokens move, int64 and of their shape, on the CPU; what lies before the first start stays."""
        step = torch.searchsorted(torch.tensor(self.starts), tokens.cpu().long(), right=True)
        return torch.tensor([0, *self.by])[step]


def token_id_dtype(tokens: int) -> torch.dtype:
    """What holds the numbers of a stream's tokens: int32, and int64 shortly before so many have entered that they would
    wrap."""
    return torch.int32 if tokens < _NARROW else torch.int64


def numbers_in(starts: Sequence[int], stops: Sequence[int]) -> torch.Tensor:
    """Numbers from each start to its stop, one range behind another, int64 on the CPU."""
    first = torch.tensor(starts, dtype=torch.int64)
    lengths = torch.tensor(stops, dtype=torch.int64) - first
    shift = first - (lengths.cumsum(0) - lengths)  # what is added to a count over all ranges
    return torch.arange(int(lengths.sum())) + shift.repeat_interleave(lengths)
