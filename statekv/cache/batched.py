"""Carried caches of several streams in one block, so that one step serves all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from weakref import ref

import torch
from transformers import Cache

from statekv.cache.carried import CarriedCache
from statekv.cache.detailed import DetailedCache
from statekv.cache.policies.base import LOG_WEIGHTS
from statekv.cache.spec import token_id_dtype
from statekv.ops.attention import attention


class BatchedCarriedCache(CarriedCache):
    """Carried caches of equal shape, whose slots lie in one block [2, streams, kv_heads, slots, head_dim] per layer.

    Each member goes on as it is: its buffers become views of its row, so that it may also be stepped alone, asked,
    saved and forked. Stepped together again, nothing is copied. A member that needs other slots moves out by itself
    (`CarriedCache.allocate`).

    Own keys and values enter the detailed cache of each member: those have lengths of their own.

    Args:
        members: of equal keys, one policy and equal lengths and budgets; they are copied into the block.
    """

    def __init__(self, members: Sequence[CarriedCache]) -> None:
        self._members = [ref(member) for member in members]  # whoever keeps a block must not keep its streams
        self._rows: list[list[torch.Tensor]] = []  # what the members' buffers are while they live here
        self._firsts: dict[torch.device, torch.Tensor] = {}  # [streams, 1, 1] int64
        one = members[0]
        spec = replace(one.spec, streams=len(members))
        detailed = DetailedCache(spec)
        super().__init__(spec, one.budget, one.policy, detailed)
        super().allocate([max(slots) for slots in zip(*(member.slots for member in members), strict=True)])
        for row, member in enumerate(members):
            for layer, length in enumerate(one.lengths):
                self.token_ids[layer][row : row + 1, :, :length] = member.token_ids[layer][..., :length]
                for name, tensor in self.state[layer].items():
                    tensor[row : row + 1, :, :length] = member.state[layer][name][..., :length]
                self.buffers[layer][:, row : row + 1, :, :length] = member.buffers[layer][..., :length, :]
        self._take_in()

    @property
    def members(self) -> list[CarriedCache]:
        """Those of them that still exist, in the order of their rows."""
        return [member for found in self._members if (member := found()) is not None]

    @property
    def id_dtype(self) -> torch.dtype:
        """What holds the numbers of all members' tokens."""
        return token_id_dtype(max((member.detailed.length for member in self.members), default=0))

    def holds(self, members: Sequence[CarriedCache]) -> bool:
        """Whether just these live here, in this order."""
        mine = self.members
        return len(mine) == len(members) == len(self._rows) and all(
            a is b and a.buffers is row for a, b, row in zip(mine, members, self._rows, strict=True)
        )

    @contextmanager
    def stepping(self, tokens: int) -> Iterator[None]:
        """Around a step of so many tokens: it begins where the members stand; afterwards they are where this is."""
        self.begin()
        try:
            self.open_slots(tokens)
            yield
        finally:
            self.end()

    def begin(self) -> None:
        """Before a step: stand where the members stand, and know the number of each one's next token."""
        members = self.members
        assert self.holds(members), "a member has moved out"
        self.lengths = list(members[0].lengths)
        for device in dict.fromkeys(self.spec.devices):
            firsts = torch.tensor([member.detailed.length for member in members])
            self._firsts[device] = firsts.view(-1, 1, 1).to(device)
            newest = [member.newest[device] for member in members if device in member.newest]
            if newest:
                self.newest[device] = torch.stack(newest).view(-1, 1, 1)

    def end(self) -> None:
        """After a step, a failed one too: the members are where this is."""
        for member in self.members:
            member.lengths = list(self.lengths)

    def remember(self, key: torch.Tensor, value: torch.Tensor, layer: int) -> torch.Tensor:
        for row, member in enumerate(self.members):
            member.detailed.append(key[row : row + 1], value[row : row + 1], layer)
        device = self.token_ids[layer].device
        return self._firsts[device] + torch.arange(key.shape[-2], device=device)

    def evict(self, layer: int, attention: torch.Tensor | None) -> None:
        first_own = self._firsts[self.token_ids[layer].device]
        self.lengths[layer] = self.shrink(layer, attention, self.lengths[layer], first_own)

    def allocate(self, slots: Sequence[int]) -> None:
        super().allocate(slots)
        if self._rows:
            self._take_in()

    def disband(self) -> None:
        """Give every member that still lives here memory of its own."""
        for member in self.members:
            if any(member.buffers is row for row in self._rows):
                member.allocate(member.slots)
        self._members.clear()

    def _take_in(self) -> None:
        rows = range(self.spec.streams)
        self._rows = [[buffer[:, row : row + 1] for buffer in self.buffers] for row in rows]
        for row, member in enumerate(self.members):
            member.buffers = self._rows[row]
            member.token_ids = [token_ids[row : row + 1] for token_ids in self.token_ids]
            member.state = [{name: tensor[row : row + 1] for name, tensor in state.items()} for state in self.state]


class StaticCarriedCache(Cache):
    """What `CarriedCache` does in a step of so many tokens once it holds its budget, with the tokens' places read from
    the device instead of known to the host.

    The carried keys fill the slots below the layer's budget, own keys come behind them, and evicted slots are replaced
    in place. Where the new keys go in the detailed cache is a tensor, so that the same recorded commands write to
    another place at every step.
    """

    def __init__(self, carried: CarriedCache, tokens: int) -> None:
        super().__init__(layers=[])
        self._carried = ref(carried)  # whoever keeps recordings by stream must not keep the stream
        self.tokens = tokens
        devices = dict.fromkeys(carried.spec.devices)
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
        return self.carried.spec.layers

    @property
    def needs_attention(self) -> bool:
        """As `CarriedCache.needs_attention`."""
        return self.carried.needs_attention

    def must_evict(self, tokens: int) -> bool:
        """Always: the cache is full."""
        return True

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
        carried.token_ids[layer_idx][..., budget : budget + self.tokens] = self.numbers[held.device]
        carried.begin_state(layer_idx, budget, budget + self.tokens)
        return slots[0], slots[1]

    def bias(self, layer: int) -> torch.Tensor | None:
        """As `CarriedCache.bias`."""
        carried = self.carried
        if not carried.policy.weighs:
            return None
        return carried.state[layer][LOG_WEIGHTS][..., : carried.budgets[layer] + self.tokens]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """As `CarriedCache.attend`."""
        return attention(query, key, value, scale=scale, bias=self.bias(layer))

    def evict(self, layer: int, attention: torch.Tensor | None) -> None:
        """As `CarriedCache.evict`."""
        carried = self.carried
        first_own = self.numbers[carried.token_ids[layer].device][0]
        carried.shrink(layer, attention, carried.budgets[layer] + self.tokens, first_own)

    def end(self) -> None:
        """After a step: the host takes note that the detailed cache has grown."""
        self.carried.detailed.advance(self.tokens)

    def get_seq_length(self, layer_idx: int = 0, *_: Any, **__: Any) -> int:
        return self.carried.lengths[layer_idx]
