"""The bounded cache that one step hands to the next."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache

from statekv.cache.carry import Rule
from statekv.cache.detailed import DetailedCache
from statekv.cache.geometry import Geometry
from statekv.ops import select


class CarriedCache(Cache):
    """At most `budget` keys and values per layer and KV head, the only past that a step sees.

    One block [layers, 2, streams, kv_heads, slots, head_dim] per device. It grows until it holds the budget and the
    longest step; from then on its addresses are constant. The order of the slots means nothing: positions are inside
    the keys, and a step sees all of them.

    Args:
        geometry: sizes of the model's keys.
        budget: keys kept per layer and head.
        rule: scores that decide who stays.
        detailed: receives every key and value too.
    """

    def __init__(self, geometry: Geometry, budget: int, rule: Rule, detailed: DetailedCache) -> None:
        super().__init__(layers=[])
        self.geometry = geometry
        self.budget = budget
        self.rule = rule
        self.detailed = detailed
        self.lengths = [0] * geometry.layers
        self.buffers: list[torch.Tensor] = []  # per layer [2, streams, kv_heads, slots, head_dim]
        self.born: list[torch.Tensor] = []  # per layer [streams, kv_heads, slots] int32: which token a slot holds
        self._allocate(0)

    def __len__(self) -> int:
        return self.geometry.layers

    @property
    def length(self) -> int:
        """Tokens held per layer and head."""
        return self.lengths[-1]

    @property
    def slots(self) -> int:
        return self.buffers[0].shape[-2]

    @property
    def nbytes(self) -> int:
        """Bytes allocated, the record of births included."""
        return sum(buffer.nbytes for buffer in self.buffers) + sum(born.nbytes for born in self.born)

    def make_room(self, tokens: int) -> None:
        """Before a step of `tokens` tokens: have a slot for each of them behind the carried ones."""
        needed = self.length + tokens
        if needed > self.slots:
            self._allocate(max(needed, min(2 * self.slots, self.budget + tokens)))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by transformers' attention layers: append to both memories, hand out carried and own keys."""
        start = self.lengths[layer_idx]
        stop = start + key_states.shape[-2]
        first = self.detailed.lengths[layer_idx]
        self.detailed.append(key_states, value_states, layer_idx)
        slots = self.buffers[layer_idx]
        slots[0, :, :, start:stop] = key_states
        slots[1, :, :, start:stop] = value_states
        born = self.born[layer_idx]
        born[:, :, start:stop] = torch.arange(first, first + stop - start, dtype=torch.int32, device=born.device)
        self.lengths[layer_idx] = stop
        return slots[0, :, :, :stop], slots[1, :, :, :stop]

    def evict(self, layer: int, scores: torch.Tensor | None) -> None:
        """Shrink a layer to the budget.

        Args:
            layer: index of the layer, just attended.
            scores: [streams, kv_heads, length] key scores; None for rules that ignore them.
        """
        length = self.lengths[layer]
        if length > self.budget:
            self.replace(layer, scores, length)
            self.lengths[layer] = self.budget

    def replace(self, layer: int, scores: torch.Tensor | None, length: int) -> None:
        """Make the first `budget` slots of a layer hold the best of its first `length` keys, in place."""
        born = self.born[layer][:, :, :length]
        kept = select.best(self.rule(scores, born, layer), self.budget)
        source, target = select.moves(kept, self.budget)
        select.apply_moves(self.buffers[layer], source, target)
        born.scatter_(-1, target, born.gather(-1, source))

    @property
    def full(self) -> bool:
        """Whether every layer holds exactly its budget: from here on all steps of one length look alike."""
        return self.lengths == [self.budget] * self.geometry.layers

    def kept(self, layer: int) -> torch.Tensor:
        """[streams, kv_heads, length] int32, ascending: which of the stream's tokens a layer carries."""
        return self.born[layer][:, :, : self.lengths[layer]].sort(-1).values

    def crop(self, max_length: int) -> None:
        """Drop what was appended behind the first `max_length` slots; only right while nothing was evicted since."""
        self.lengths = [min(length, max_length) for length in self.lengths]

    def get_seq_length(self, layer_idx: int = 0, *_: Any, **__: Any) -> int:
        return self.lengths[layer_idx]

    def _allocate(self, slots: int) -> None:
        g = self.geometry
        rows: dict[torch.device, int] = {device: g.devices.count(device) for device in g.devices}
        blocks = {
            device: torch.empty(n, 2, g.streams, g.kv_heads, slots, g.head_dim, dtype=g.dtype, device=device)
            for device, n in rows.items()
        }
        births = {
            device: torch.empty(n, g.streams, g.kv_heads, slots, dtype=torch.int32, device=device)
            for device, n in rows.items()
        }
        old_buffers, old_born = self.buffers, self.born
        self.buffers, self.born = [], []
        for device in g.devices:
            row = sum(buffer.device == blocks[device].device for buffer in self.buffers)
            self.buffers.append(blocks[device][row])
            self.born.append(births[device][row])
        for layer, length in enumerate(self.lengths if old_buffers else []):
            self.buffers[layer][..., :length, :] = old_buffers[layer][..., :length, :]
            self.born[layer][..., :length] = old_born[layer][..., :length]
