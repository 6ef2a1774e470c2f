"""The append-only cache that answers are decoded against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from transformers import Cache

from statekv.cache.folder import Part, Written, tokens_of_part
from statekv.cache.spec import KVSpec, PositionShift, numbers_in
from statekv.ops.attention import attention, attention_over
from statekv.ops.rope import Angles, rotate

# Of steps that begin at these tokens, what their carried keys score, where that is not 0, by start.
Importance = Callable[[Sequence[int]], dict[int, float]]

_FIRST_CAPACITY = 256  # tokens
_COPIED_SHARE = 1 / 64  # of a layer's tokens: a cap on memory holds for what is copied aside too
_LEAST_COPIED, _MOST_COPIED = 256, 4096  # tokens


class DetailedCache(Cache):
    """Keys and values of every token, written in place into buffers that double when full.

    A cache per layer of shape [2, streams, kv_heads, capacity, head_dim]. Copied bytes over n tokens are O(n); after
    `reserve` nothing is copied at all.

    Args:
        spec: sizes of the model's keys.
        recall: which keys an answer sees: recent and sink_recent; all for any other.
        window: tokens that `recent` recalls, and `sink_recent` too, its sinks included.
        sinks: tokens from the start of the stream for `sink_recent`.
    """

    def __init__(self, spec: KVSpec, recall: str = "all", window: int = 0, sinks: int = 0) -> None:
        super().__init__(layers=[])
        self.spec = spec
        self.recall = recall
        self.window = window
        self.sinks = sinks if recall == "sink_recent" else 0
        self.lengths = [0] * spec.layers
        self.buffers = [self._allocate(layer, 0) for layer in range(spec.layers)]
        self.away = 0  # tokens of the stream that the buffers do not hold any more
        self.written = Written()
        self.grown = 0  # how many times a buffer was copied into a larger one
        self.forgotten = 0  # steps
        self._answering_from: int | None = None
        self._sharing: WeakSet[DetailedCache] = WeakSet([self])  # forks, which may lie in the same buffers

    def __len__(self) -> int:
        return self.spec.layers

    @property
    def length(self) -> int:
        """Tokens that have entered, which is the number of the next one."""
        return self.number(-1)

    def number(self, layer: int) -> int:
        """Number in the stream of the token that enters a layer next."""
        return self.lengths[layer] + self.away

    @property
    def capacity(self) -> int:
        """Tokens that fit without another allocation."""
        return self.buffers[-1].shape[-2]

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(buffer.nbytes for buffer in self.buffers)

    @property
    def dropped(self) -> range:
        """Numbers of tokens that are gone because no answer can see them any more: none, where all may be seen."""
        return range(0)

    @property
    def bytes_by_tier(self) -> dict[str, int]:
        """Bytes of steps that do not lie in the buffers, by where they do."""
        return {}

    @property
    def most_steps(self) -> int | None:
        """How many steps there may be at once; None: no limit."""
        return None

    @property
    def at_once(self) -> int:
        """Tokens of a layer that are copied aside at once where they change their place or are turned."""
        return max(_LEAST_COPIED, min(_MOST_COPIED, int(_COPIED_SHARE * self.capacity)))

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where the buffers lie; these change only when a buffer grows."""
        return tuple(buffer.data_ptr() for buffer in self.buffers)

    def make_room(self, tokens: int) -> None:
        """Before a step of `tokens` tokens: have room for each of them, by doubling where there is none."""
        for layer, length in enumerate(self.lengths):
            self._make_room(layer, length + tokens)

    def advance(self, tokens: int) -> None:
        """Take note of tokens that were written behind the last ones of every layer."""
        self.lengths = [length + tokens for length in self.lengths]

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens in all, so that no later append copies anything."""
        for layer in range(self.spec.layers):
            self._grow(layer, tokens)

    def append(self, key: torch.Tensor, value: torch.Tensor, layer: int) -> None:
        """Write keys and values [streams, kv_heads, T, head_dim] behind those of the layer."""
        start = self.lengths[layer]
        stop = start + key.shape[-2]
        self._make_room(layer, stop)
        self.buffers[layer][0, :, :, start:stop] = key
        self.buffers[layer][1, :, :, start:stop] = value
        self.lengths[layer] = stop

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by transformers' attention layers: append, and hand out what this pass may see."""
        self.append(key_states, value_states, layer_idx)
        stop = self.lengths[layer_idx]
        held = self.buffers[layer_idx]
        start = self._first_recalled()
        if start <= self.sinks:
            seen = held[..., :stop, :]
        elif self.sinks:
            seen = torch.cat([held[..., : self.sinks, :], held[..., start:stop, :]], dim=-2)
        else:
            seen = held[..., start:stop, :]
        return seen[0], seen[1]

    def bias(self, layer: int) -> torch.Tensor | None:
        """None: every key counts once."""
        return None

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """[streams, heads, T, head_dim]: queries over what `update` has handed out."""
        return attention(query, key, value, scale=scale)

    def evict(self, layer: int, attention: torch.Tensor | None) -> None:
        """Nothing: all keys stay."""

    def must_evict(self, tokens: int) -> bool:
        """Never."""
        return False

    @property
    def needs_attention(self) -> bool:
        """No key scores are needed."""
        return False

    def make_way(self, tokens: int, room: int, importance: Importance) -> list[int]:
        """Before a step: nothing, for there is no cap; see `TieredCache.make_way`."""
        return []

    def settle(self) -> list[int]:
        """Starts of steps that were forgotten: none ever is."""
        return []

    def note(self, kind: str, tokens: int) -> None:
        """Take note of which segment the newest tokens are: here all are alike."""

    def rotate(self, moves: PositionShift, angles: Angles) -> None:
        """Rotate keys further, in float32 and in place.

        Args:
            moves: how far each token moves.
            angles: of such distances.
        """
        self.written.forget(moves.starts[0])
        numbers = self._numbers()
        first = int(torch.searchsorted(numbers, moves.starts[0]))
        by = moves.of(numbers[first:])
        for layer in range(len(self)):
            self._claim(layer, first)
        for start in range(0, len(by), self.at_once):
            part = by[start : start + self.at_once]
            cos, sin = angles(part)
            spot = slice(first + start, first + start + len(part))
            for held in self.buffers:
                keys = held[0, :, :, spot]
                keys.copy_(rotate(keys.float(), cos.to(keys.device)[:, None], sin.to(keys.device)[:, None]))

    def newest(self, layer: int, tokens: int) -> torch.Tensor:
        """Keys of the newest tokens, [streams, kv_heads, tokens, head_dim], a view."""
        length = self.lengths[layer]
        return self.buffers[layer][0, :, :, length - tokens : length]

    def gather(self, layer: int, starts: Sequence[int], stops: Sequence[int]) -> torch.Tensor:
        """Keys and values [2, streams, kv_heads, n, head_dim] of whole segments, copied out.

        Args:
            layer: index of the layer.
            starts, stops: numbers of their tokens, ascending.
        """
        return self.buffers[layer].index_select(-2, numbers_in(starts, stops).to(self.buffers[layer].device))

    def fork(self) -> DetailedCache:
        """A second cache with the same tokens, in the same memory.

        Either may write behind them where the other holds nothing; where it does, whoever comes second moves to a copy.
        """
        found = DetailedCache(self.spec, self.recall, self.window, self.sinks)
        found.lengths, found.buffers = list(self.lengths), list(self.buffers)
        self._share(found)
        return found

    def extent(self, layer: int) -> int:
        """Tokens that lie in the layer's buffer."""
        return self.lengths[layer]

    def step_aside(self, start: int) -> bool:
        """Asked by another cache in the same buffers that is to write from token `start` on: False, it has to move."""
        return False

    def begin_answer(self, moved: Angles) -> None:
        """From here on everything appended belongs to a question: the recall window stops moving.

        Args:
            moved: of how far steps have moved since they entered, [T] int64, to cos and sin.
        """
        self._answering_from = self.length

    def truncate(self, max_length: int) -> None:
        """Forget all but the first `max_length` tokens; nothing is copied."""
        self.lengths = [min(length, max_length - self.away) for length in self.lengths]
        self._answering_from = None
        self.written.forget(max_length)

    def parts(self) -> Iterator[Part]:
        """What the buffers hold, cut at the same tokens at every time: pieces stay the same when more tokens come."""
        numbers, g = self._numbers(), self.spec
        size = tokens_of_part(g.bytes_per_token * g.streams)
        for group in (numbers // size).unique().tolist():
            first, stop = torch.searchsorted(numbers, torch.tensor([group * size, (group + 1) * size])).tolist()
            yield Part(int(numbers[first]), int(numbers[stop - 1]) + 1, partial(self._part, first, stop))

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Append what `parts` has handed out, part by part."""
        for layer in range(len(self)):
            key, value = tensors[_layer_name(layer)]
            self.append(key, value, layer)

    def keys(self, layer: int) -> torch.Tensor:
        """[streams, kv_heads, length, head_dim], a view."""
        return self.buffers[layer][0, :, :, : self.lengths[layer]]

    def values(self, layer: int) -> torch.Tensor:
        """[streams, kv_heads, length, head_dim], a view."""
        return self.buffers[layer][1, :, :, : self.lengths[layer]]

    def _share(self, fork: DetailedCache) -> None:
        """Know each other, so as not to write where the other holds tokens."""
        fork.written = self.written.copy()
        self._sharing.add(fork)
        fork._sharing = self._sharing

    def _numbers(self) -> torch.Tensor:
        """[length] int64 on the CPU, ascending: which tokens of the stream the buffers hold."""
        return torch.arange(self.length)

    def get_seq_length(self, layer_idx: int = 0, *_: Any, **__: Any) -> int:
        return self.lengths[layer_idx]

    def _part(self, first: int, stop: int) -> dict[str, torch.Tensor]:
        held = enumerate(self.buffers)
        return {_layer_name(layer): buffer[..., first:stop, :].contiguous() for layer, buffer in held}

    def _first_recalled(self) -> int:
        """Where the first of the newest tokens lies that an answer sees; 0 where it sees all of them."""
        if self.recall not in ("recent", "sink_recent") or self._answering_from is None:
            return 0
        return max(0, self._answering_from - self.away - (self.window - self.sinks))

    def _make_room(self, layer: int, tokens: int) -> None:
        capacity = self.buffers[layer].shape[-2]
        if tokens > capacity:
            self._grow(layer, max(tokens, self._doubled(capacity)))
        else:
            self._claim(layer, self.lengths[layer])

    def _doubled(self, capacity: int) -> int:
        """How much a full buffer may as well hold next."""
        return max(2 * capacity, _FIRST_CAPACITY)

    def _grow(self, layer: int, tokens: int) -> None:
        if tokens > self.buffers[layer].shape[-2]:
            self._move(layer, tokens)

    def _claim(self, layer: int, start: int) -> None:
        """Before writing from token `start` on: move to a copy where a fork holds tokens there."""
        for other in self._sharing:
            here = other is not self and other.buffers[layer] is self.buffers[layer]
            if here and other.extent(layer) > start and not other.step_aside(start):
                self._move(layer, self.buffers[layer].shape[-2])
                return

    def _move(self, layer: int, tokens: int) -> None:
        old, new = self.buffers[layer], self._allocate(layer, tokens)
        if self.lengths[layer]:
            new[..., : self.lengths[layer], :] = old[..., : self.lengths[layer], :]
            self.grown += 1
        self.buffers[layer] = new

    def _allocate(self, layer: int, tokens: int) -> torch.Tensor:
        g = self.spec
        shape = (2, g.streams, g.kv_heads, tokens, g.head_dim)
        return torch.empty(shape, dtype=g.dtype, device=g.devices[layer])


class AnswerCache(DetailedCache):
    """A stream's tokens as they were when it was asked, and behind them a question and its answer.

    Question and answer lie in the stream's own buffers, behind its last token, and are read with it in one piece. Where
    something else enters there, they step aside into buffers of their own: a few tokens are copied, the stream's stay
    where they are, and attention is joined from both. That differs from one piece by rounding alone.

    Args:
        stream: holds the question, and frames that waited, behind its tokens; it is cropped afterwards.
        tokens: of the stream, without them.
    """

    def __init__(self, stream: DetailedCache, tokens: int) -> None:
        super().__init__(stream.spec, stream.recall, stream.window, stream.sinks)
        self.lengths, self.buffers, self.away = list(stream.lengths), list(stream.buffers), stream.away
        self._past = tokens - stream.away  # tokens in the buffers that are the stream's
        self._answering_from = stream._answering_from
        self._own: DetailedCache | None = None  # those behind them, once they have stepped aside
        stream._share(self)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `DetailedCache.update`; once they have stepped aside, question and answer alone come out."""
        seen = super().update(key_states, value_states, layer_idx)
        if self._own is None:
            return seen
        hidden = max(0, self._first_recalled() - self._past)  # of frames that waited, and are longer than the window
        return self._own.keys(layer_idx)[:, :, hidden:], self._own.values(layer_idx)[:, :, hidden:]

    def append(self, key: torch.Tensor, value: torch.Tensor, layer: int) -> None:
        """As `DetailedCache.append`; the stream's buffers are not grown for an answer."""
        stop = self.lengths[layer] + key.shape[-2]
        if self._own is None and stop > self.buffers[layer].shape[-2]:
            self.step_aside(self._past)
        if self._own is None:
            super().append(key, value, layer)
        else:
            self._own.append(key, value, layer)
            self.lengths[layer] = stop

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """As `DetailedCache.attend`, over both places."""
        if self._own is None:
            return super().attend(layer, query, key, value, scale)
        return attention_over(query, self._pieces(layer), key, value, scale=scale)

    def step_aside(self, start: int) -> bool:
        """Leave the stream's buffers from a place on; False where that place is among what the stream had seen."""
        if start < self._past:
            return False
        if self._own is None:
            self._own = DetailedCache(self.spec)
            for layer, (held, length) in enumerate(zip(self.buffers, self.lengths, strict=True)):
                key, value = held[..., self._past : length, :]
                self._own.append(key, value, layer)
        return True

    def extent(self, layer: int) -> int:
        """Tokens that lie in the stream's buffers."""
        return self.lengths[layer] if self._own is None else self._past

    def _pieces(self, layer: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Those of the stream's keys and values that the answer sees, [streams, kv_heads, n, head_dim]."""
        held, start = self.buffers[layer], self._first_recalled()
        for first, stop in ((0, self._past),) if start <= self.sinks else ((0, self.sinks), (start, self._past)):
            if first < stop:
                key, value = held[..., first:stop, :]
                yield key, value


def _layer_name(layer: int) -> str:
    return f"layer-{layer:02d}"
