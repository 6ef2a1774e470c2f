"""What an answer is decoded against while its stream goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from statekv.cache.detailed import DetailedCache
from statekv.ops.attention import attention_over


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
        self._answering_from = stream.answering_from
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
