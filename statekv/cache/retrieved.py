"""What one answer sees where a question chooses the steps that it is answered from."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache

from statekv.cache.blocks import Blocks
from statekv.cache.carried import CarriedCache
from statekv.cache.detailed import DetailedCache
from statekv.cache.moves import numbers_in
from statekv.config import Config
from statekv.ops.rope import Angles, rotate
from statekv.ops.select import earliest_best


class Retrieved(Cache):
    """The best blocks of the detailed cache for one question, and the question and its answer behind them.

    In each layer the question's own queries there choose the `retrieve` blocks with the highest scores. An answer sees
    these, the newest `retrieve_newest` steps, all text that is no step, carried keys where the configuration says so,
    and itself. The choice is made once, by the question's prefill, for all heads of a layer together; the chosen keys
    and values are copied out, so that a token of the answer reads them in one piece.

    After ReKV (arXiv 2503.00540; Becomebright/ReKV). Different there: blocks are chosen by the question's bare text,
    with the chat template around it only prefilled afterwards; and retrieved keys always get new positions.

    Args:
        detailed: every key; the question and the answer enter it too.
        blocks: representatives of its steps; more than are shown.
        carried: what steps see, where an answer sees it too.
        config: how many blocks, and at which positions.
        angles: of the model's RoPE.
        positions: of the question's tokens, [streams, T] or [3, streams, T].
    """

    def __init__(
        self,
        detailed: DetailedCache,
        blocks: Blocks,
        carried: CarriedCache | None,
        config: Config,
        angles: Angles,
        positions: torch.Tensor,
    ) -> None:
        super().__init__(layers=[])
        assert detailed.geometry.streams == 1, "blocks of several streams differ in length"
        self.detailed, self.blocks, self.carried, self.config = detailed, blocks, carried, config
        self.chosen: list[torch.Tensor | None] = [None] * len(detailed)  # per layer [n] int64, ascending
        self._hidden: list[torch.Tensor | None] = [None] * len(detailed)
        self._angles, self._axes = angles, positions.shape[:-1]
        self._question = angles(positions)
        self._free = len(blocks) - config.retrieve_newest  # blocks that have to be chosen to be seen
        self._texts = [*blocks.texts, *blocks.text_behind(detailed.length)]
        self._seen = DetailedCache(detailed.geometry)
        self._seen.reserve(self._most() + positions.shape[-1] + config.max_new_tokens)

    def __len__(self) -> int:
        return len(self.detailed)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by transformers' attention layers: append, and hand out what is seen, once that has been chosen."""
        self.detailed.append(key_states, value_states, layer_idx)
        if self.chosen[layer_idx] is None:
            return key_states, value_states
        return self._seen.update(key_states, value_states, layer_idx)

    def complete(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Choose, where that has not been done, now that the queries are known.

        Args:
            layer: index of the layer.
            query: [1, heads, T, head_dim], rotated.
            key, value: [1, kv_heads, K, head_dim], as `update` has handed them out.

        Returns:
            Keys and values seen, own ones last; and which of the first of them are hidden after all,
            [1, kv_heads, n] bool: carried keys that lie in a chosen block and would count twice. None: none of them.
        """
        if self.chosen[layer] is None:
            self._fetch(layer, self._choose(layer, query))
            key, value = self._seen.update(key, value, layer)
        return key, value, self._hidden[layer]

    def get_seq_length(self, layer_idx: int = 0, *_: Any, **__: Any) -> int:
        return self.detailed.lengths[layer_idx]

    def _choose(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """[blocks] bool: those that the answer sees in this layer."""
        cos, sin = (part.to(query.device)[:, None] for part in self._question)
        mean = rotate(query.float(), cos, -sin).mean(-2)
        scores = self.blocks.scores(layer, mean)[0, : self._free]
        shown = torch.ones(len(self.blocks), dtype=torch.bool, device=query.device)
        shown[: self._free] = earliest_best(scores, self.config.retrieve)
        return shown

    def _fetch(self, layer: int, shown: torch.Tensor) -> None:
        chosen = shown.nonzero()[:, 0].cpu()  # the host waits for the device here, once for each layer of a question
        texts = torch.tensor(self._texts, dtype=torch.int64).view(-1, 2)
        spots = torch.cat([self.blocks.table[chosen, :2], texts])
        starts, stops = spots[spots[:, 0].argsort()].unbind(1)
        held = self.detailed.gather(layer, starts.tolist(), stops.tolist())
        tokens = numbers_in(starts.tolist(), stops.tolist()).to(held.device)
        if self.config.retrieve_positions == "reindex":
            held[0] = self._moved_up(held[0], ~shown, tokens)
        self._seen.append(held[0], held[1], layer)
        self.chosen[layer] = tokens
        if self.carried is not None:
            self._add_carried(layer, tokens)

    def _moved_up(self, keys: torch.Tensor, left_out: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Keys closed up towards the question, whose own positions stay.

        Only distances matter to RoPE, so this is the same as numbering what is seen from 0 on, question included;
        but the question is at one place in all layers, whatever each of them has chosen.

        Args:
            keys: [1, kv_heads, n, head_dim].
            left_out: [blocks] bool.
            tokens: [n], the keys' numbers in the stream.
        """
        starts, _, sizes, lost = self.blocks.table.T.contiguous().to(keys.device)
        behind = torch.searchsorted(starts, tokens, right=True)  # the first block behind each key
        gaps = sizes * left_out + lost
        gaps = torch.cat([gaps.flip(0).cumsum(0).flip(0), sizes.new_zeros(1)])  # left out from there on
        cos, sin = self._angles(gaps[behind].expand(*self._axes, -1))
        return rotate(keys.float(), cos[:, None], sin[:, None]).to(keys.dtype)

    def _add_carried(self, layer: int, shown: torch.Tensor) -> None:
        """Behind the tokens that are shown [n], ascending."""
        assert self.carried is not None
        length = self.carried.lengths[layer]
        keys, values = self.carried.buffers[layer][..., :length, :]
        twice = torch.isin(self.carried.born[layer][..., :length].long(), shown)  # [1, kv_heads, length]
        first = twice.new_zeros(*twice.shape[:2], self._seen.lengths[layer])
        self._hidden[layer] = torch.cat([first, twice], dim=-1)
        self._seen.append(keys, values, layer)

    def _most(self) -> int:
        """Tokens that any choice shows at most."""
        lengths = self.blocks.table[:, 1] - self.blocks.table[:, 0]
        chosen = lengths[: self._free].sort(descending=True).values[: self.config.retrieve]
        texts = sum(stop - start for start, stop in self._texts)
        carried = self.carried.length if self.carried is not None else 0
        return int(chosen.sum() + lengths[self._free :].sum()) + texts + carried
