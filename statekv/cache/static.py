"""One step of a full carried cache with every address and every shape fixed, so that a device can replay it."""

from __future__ import annotations

from typing import Any
from weakref import ref

import torch
from transformers import Cache

from statekv.cache.carried import CarriedCache


class StaticStep(Cache):
    """What `CarriedCache` does in a step, with the tokens' places read from the device instead of known to the host.

    The carried keys fill the slots below the layer's budget, own keys come behind them, and evicted slots are replaced
    in place. Where the new keys go in the detailed cache is a tensor, so that the same recorded commands write to
    another place at every step.

    Args:
        carried: a cache that holds its budget.
        tokens: of one step.
    """

    def __init__(self, carried: CarriedCache, tokens: int) -> None:
        super().__init__(layers=[])
        self._carried = ref(carried)  # whoever keeps recordings by stream must not keep the stream
        self.tokens = tokens
        devices = dict.fromkeys(carried.geometry.devices)
        # Where each own token goes in the detailed cache's buffers, and its number in the stream, [T] int64.
        self.places, self.numbers = (
            {device: torch.empty(tokens, dtype=torch.int64, device=device) for device in devices} for _ in range(2)
        )

    @property
    def carried(self) -> CarriedCache:
        """The cache that is stepped."""
        carried = self._carried()
        assert carried is not None, "a step outlived its stream"
        return carried

    def __len__(self) -> int:
        return self.carried.geometry.layers

    def begin(self) -> None:
        """Before a step: say where its tokens go. Nothing here may be part of the replayed commands."""
        detailed = self.carried.detailed
        for first, tensors in ((detailed.lengths[-1], self.places), (detailed.length, self.numbers)):
            for device, tensor in tensors.items():
                torch.arange(first, first + self.tokens, out=tensor, device=device)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by transformers' attention layers: append to both memories, hand out carried and own keys."""
        carried, budget = self.carried, self.carried.budgets[layer_idx]
        slots = carried.buffers[layer_idx][..., : budget + self.tokens, :]
        own = slots[..., budget:, :]  # [2, streams, kv_heads, T, D]
        own[0].copy_(key_states)
        own[1].copy_(value_states)
        held = carried.detailed.buffers[layer_idx]
        held.index_copy_(-2, self.places[held.device], own)
        carried.born[layer_idx][..., budget : budget + self.tokens] = self.numbers[held.device]
        if carried.totals:
            carried.totals[layer_idx][..., budget : budget + self.tokens] = 0
        return slots[0], slots[1]

    def evict(self, layer: int, scores: torch.Tensor | None) -> None:
        """As `CarriedCache.evict`."""
        carried = self.carried
        carried.replace(layer, carried.accumulated(layer, scores), carried.budgets[layer] + self.tokens)

    def end(self) -> None:
        """After a step: the host takes note that the detailed cache has grown."""
        self.carried.detailed.advance(self.tokens)

    def get_seq_length(self, layer_idx: int = 0, *_: Any, **__: Any) -> int:
        return self.carried.lengths[layer_idx]
