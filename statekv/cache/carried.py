"""The bounded cache that one step hands to the next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache

from statekv.cache.detailed import DetailedCache
from statekv.cache.policies.base import LOG_WEIGHTS, Candidates, Policy
from statekv.cache.policies.wrappers import IMPORTANCE
from statekv.cache.spec import KVSpec, PositionShift, token_id_dtype
from statekv.ops import select
from statekv.ops.attention import attention
from statekv.ops.rope import Angles, rotate

_EMPTY = -1  # token number of a slot that holds no key


class CarriedCache(Cache):
    """At most `budget` keys and values per layer and KV head, the only past that a step sees.

    One block [layers, 2, streams, kv_heads, slots, head_dim] per device. It grows until it holds the budget and the
    longest step; from then on its addresses are constant. The order of the slots means nothing: positions are inside
    the keys, and a step sees all of them.

    Args:
        budget: keys kept per layer and head, the mean of all layers.

    Attributes:
        shares: keys that a head of each layer keeps on average.
        budgets: slots of each layer once it is full; its share, unless heads share that out unevenly.
        lengths: slots of each layer that are in use.
        buffers: of each layer [2, streams, kv_heads, slots, head_dim].
        token_ids: of each layer [streams, kv_heads, slots] of `id_dtype`: which token a slot holds, -1: none.
        state: of each layer what the policy remembers of each key, [streams, kv_heads, slots] float32 by name.
        newest: first token of the pinned newest steps, 0-d int64, by device.
    """

    def __init__(self, spec: KVSpec, budget: int, policy: Policy, detailed: DetailedCache) -> None:
        super().__init__(layers=[])
        self.spec = spec
        self.budget = budget
        self.policy = policy
        self.detailed = detailed
        self.shares = list(policy.layer_budgets(budget, spec.layers))
        self.budgets = [policy.slots(share) for share in self.shares]
        self.lengths = [0] * spec.layers
        self.buffers: list[torch.Tensor] = []
        self.token_ids: list[torch.Tensor] = []
        self.state: list[dict[str, torch.Tensor]] = [{} for _ in range(spec.layers)]
        self.newest: dict[torch.device, torch.Tensor] = {}
        self._remembers = {**policy.state, **({LOG_WEIGHTS: 0.0} if policy.weighs else {})}
        self._first_own = 0  # number of the first token of the step that is entering
        self.allocate([0] * spec.layers)

    def __len__(self) -> int:
        return self.spec.layers

    def __repr__(self) -> str:
        return f"CarriedCache({self.length} of {max(self.budgets)} slots, {len(self)} layers, {self.policy!r})"

    @property
    def length(self) -> int:
        """Slots in use per layer and head; where layers differ, of those that use the most."""
        return max(self.lengths)

    @property
    def slots(self) -> list[int]:
        """Of each layer."""
        return [token_ids.shape[-1] for token_ids in self.token_ids]

    @property
    def nbytes(self) -> int:
        """Bytes allocated, tokens' numbers and the policy's state included."""
        return sum(tensor.nbytes for tensor in (*self.buffers, *self.token_ids, *self._states()))

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where everything lies that a step reads and writes, and how far streams of one block lie apart."""
        tensors = (*self.buffers, *self.token_ids, *self._states(), *self.newest.values())
        return tuple(number for tensor in tensors for number in (tensor.data_ptr(), *tensor.stride()[:1]))

    @property
    def id_dtype(self) -> torch.dtype:
        """What holds the numbers of the tokens that have entered, and of those of the next step."""
        return token_id_dtype(self.detailed.length)

    @property
    def needs_attention(self) -> bool:
        """Whether the policy goes by key scores."""
        return self.policy.needs_attention

    @property
    def full(self) -> bool:
        """Whether every layer holds exactly its budget: from here on all steps of one length look alike."""
        return self.lengths == self.budgets

    def open_slots(self, tokens: int) -> None:
        """Before a step: have a slot for each of its tokens behind the carried ones."""
        needed = [length + tokens for length in self.lengths]
        wide = self.id_dtype.itemsize <= self.token_ids[0].dtype.itemsize
        if not wide or any(n > slots for n, slots in zip(needed, self.slots, strict=True)):
            grown = zip(needed, self.slots, self.budgets, strict=True)
            self.allocate([max(n, slots, min(2 * slots, budget + tokens)) for n, slots, budget in grown])

    def pin_from(self, token: int) -> None:
        """From here on tokens with this number and above stay whatever their scores; the host does not wait."""
        for device in dict.fromkeys(self.spec.devices):
            if device not in self.newest:
                self.newest[device] = torch.empty((), dtype=torch.int64, device=device)
            self.newest[device].fill_(token)

    def must_evict(self, tokens: int) -> bool:
        """Whether a step of `tokens` tokens ends with `evict`: where a layer overflows, or the policy keeps state."""
        over = any(length + tokens > share for length, share in zip(self.lengths, self.shares, strict=True))
        return over or self.policy.every_step

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by transformers' attention layers: append to both memories, hand out carried and own keys."""
        start = self.lengths[layer_idx]
        stop = start + key_states.shape[-2]
        slots = self.buffers[layer_idx]
        self.token_ids[layer_idx][:, :, start:stop] = self.remember(key_states, value_states, layer_idx)
        slots[0, :, :, start:stop] = key_states
        slots[1, :, :, start:stop] = value_states
        self.begin_state(layer_idx, start, stop)
        self.lengths[layer_idx] = stop
        return slots[0, :, :, :stop], slots[1, :, :, :stop]

    def remember(self, key: torch.Tensor, value: torch.Tensor, layer: int) -> torch.Tensor:
        """Enter a layer's own keys and values [streams, kv_heads, T, head_dim] into the detailed cache.

        Returns:
            [T] or [streams, 1, T] int64: which tokens of the stream they are.
        """
        first = self._first_own = self.detailed.number(layer)
        self.detailed.append(key, value, layer)
        return torch.arange(first, first + key.shape[-2], device=self.token_ids[layer].device)

    def begin_state(self, layer: int, start: int, stop: int) -> None:
        """What the policy remembers of keys that have just entered these slots."""
        for name, tensor in self.state[layer].items():
            tensor[:, :, start:stop] = self._remembers[name]

    def bias(self, layer: int) -> torch.Tensor | None:
        """[streams, kv_heads, K] float32: log weights of the keys that `update` has handed out; None: all are 0."""
        # A layer that has evicted once holds its share of former keys from then on, and own ones.
        if not self.policy.weighs or self.lengths[layer] <= self.shares[layer]:
            return None
        return self.state[layer][LOG_WEIGHTS][..., : self.lengths[layer]]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """[streams, heads, T, head_dim]: queries over what `update` has handed out."""
        return attention(query, key, value, scale=scale, bias=self.bias(layer))

    def evict(self, layer: int, attention: torch.Tensor | None) -> None:
        """Have the policy judge a layer that was just attended, and shrink it to its budget.

        Args:
            attention: [streams, kv_heads, length] float32 key scores; None for policies that ignore them.
        """
        self.lengths[layer] = self.shrink(layer, attention, self.lengths[layer], self._first_own)

    def shrink(self, layer: int, attention: torch.Tensor | None, length: int, first_own: int | torch.Tensor) -> int:
        """Make the first slots of a layer, as many as its budget, hold the best of its first `length` keys, in place;
        returns how many slots are in use then.
        """
        keys, values = self.buffers[layer][:, :, :, :length]
        token_ids = self.token_ids[layer][:, :, :length]
        state = {name: tensor[:, :, :length] for name, tensor in self.state[layer].items()}
        newest = self.newest[token_ids.device] if self.newest else None
        share, stay = self.shares[layer], min(length, self.budgets[layer])
        candidates = Candidates(layer, share, keys, values, token_ids, attention, first_own, newest, state)
        scores = self.policy.score(candidates)
        if length <= share:
            return length
        if self.policy.weighs:
            scores = scores.masked_fill(token_ids == _EMPTY, float("-inf"))
        kept = select.best(scores, stay)
        if self.policy.weighs:
            state[LOG_WEIGHTS].copy_(self.policy.log_weights(candidates, scores, kept))
            token_ids.masked_fill_(state[LOG_WEIGHTS] == float("-inf"), _EMPTY)
        if stay < length:
            source, target = select.moves(kept, stay)
            select.apply_moves(self.buffers[layer], source, target)
            for beside in (token_ids, *state.values()):
                beside.scatter_(-1, target, beside.gather(-1, source))
        return stay

    def rotate(self, moves: PositionShift, angles: Angles) -> None:
        """Rotate carried keys by the angles of how far each token of the stream moves, in float32 and in place."""
        for layer, length in enumerate(self.lengths):
            token_ids = self.token_ids[layer][..., :length]
            moved = moves.of(token_ids)  # [streams, kv_heads, length]
            cos, sin = (part.view(*token_ids.shape, -1).to(token_ids.device) for part in angles(moved.flatten()))
            keys = self.buffers[layer][0, :, :, :length]
            keys.copy_(rotate(keys.float(), cos, sin))

    def importance(self, starts: Sequence[int]) -> dict[int, tuple[float, int]]:
        """Segments of which something is carried, by the number of their first token: the attention that their keys
        were last judged by, and how many they are. Starts ascend; each segment ends where the next begins.
        """
        first = torch.tensor(starts, dtype=torch.int64)
        scores, counts = torch.zeros(2, len(starts) + 1, dtype=torch.float64)
        for layer, length in enumerate(self.lengths):
            segment = torch.searchsorted(first, self.token_ids[layer][..., :length].flatten().cpu().long(), right=True)
            noted = self.state[layer][IMPORTANCE][..., :length]
            scores.scatter_add_(0, segment, noted.flatten().cpu().double())
            counts += segment.bincount(minlength=len(counts))
        held = counts[1:].nonzero()[:, 0]
        found = zip(held.tolist(), scores[1:][held].tolist(), counts[1:][held].long().tolist(), strict=True)
        return {starts[number]: (score, count) for number, score, count in found}

    def held_of(self, starts: Sequence[int]) -> set[int]:
        """Starts of segments that have keys here; each ends where the next begins, and these are ascending."""
        first, counts = torch.tensor(starts, dtype=torch.int64), torch.zeros(len(starts) + 1, dtype=torch.int64)
        for layer, length in enumerate(self.lengths):
            tokens = self.token_ids[layer][..., :length].flatten().cpu().long()
            counts += torch.searchsorted(first, tokens, right=True).bincount(minlength=len(counts))
        return {starts[number] for number in counts[1:].nonzero()[:, 0].tolist()}

    def kept(self, layer: int) -> torch.Tensor:
        """[streams, kv_heads, length], ascending: which of the stream's tokens a layer carries; -1: no token."""
        return self.token_ids[layer][:, :, : self.lengths[layer]].sort(-1).values

    def truncate(self, max_length: int) -> None:
        """Drop what was appended since `length` was `max_length`; only right while nothing was evicted since.

        A layer whose budget is smaller than that held no more than its budget then.
        """
        self.lengths = [
            min(length, max_length, budget) for length, budget in zip(self.lengths, self.budgets, strict=True)
        ]

    def get_seq_length(self, layer_idx: int = 0, *_: Any, **__: Any) -> int:
        return self.lengths[layer_idx]

    def fork(self, detailed: DetailedCache) -> CarriedCache:
        """A copy that enters keys and values into another detailed cache."""
        found = CarriedCache(self.spec, self.budget, self.policy, detailed)
        found.allocate(self.slots)
        found.lengths = list(self.lengths)
        for mine, its in zip(self._tensors(), found._tensors(), strict=True):
            its.copy_(mine)
        return found

    def allocate(self, slots: Sequence[int]) -> None:
        """Have so many slots in each layer; what the layers hold moves along."""
        g = self.spec
        rows = [(g.streams, g.kv_heads, n) for n in slots]
        buffers = one_block([(2, *row, g.head_dim) for row in rows], g.dtype, g.devices)
        token_ids = one_block(rows, self.id_dtype, g.devices)
        by_name = {name: one_block(rows, torch.float32, g.devices) for name in self._remembers}
        state = [{name: tensors[layer] for name, tensors in by_name.items()} for layer in range(g.layers)]
        for layer, length in enumerate(self.lengths if self.buffers else []):
            buffers[layer][..., :length, :] = self.buffers[layer][..., :length, :]
            token_ids[layer][..., :length] = self.token_ids[layer][..., :length]
            for name, tensor in state[layer].items():
                tensor[..., :length] = self.state[layer][name][..., :length]
        # Last of all: a save on another thread may be reading.
        self.buffers, self.token_ids, self.state = buffers, token_ids, state

    def _states(self) -> list[torch.Tensor]:
        return [tensor for state in self.state for tensor in state.values()]

    def _tensors(self) -> list[torch.Tensor]:
        return [*self.buffers, *self.token_ids, *self._states()]


def one_block(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, devices: Sequence[torch.device]
) -> list[torch.Tensor]:
    """Uninitialised tensors, one for each layer's shape, which lie one behind another in a single block of their
    device.
    """
    sizes = [math.prod(shape) for shape in shapes]
    blocks = {
        device: torch.empty(
            sum(n for n, d in zip(sizes, devices, strict=True) if d == device), dtype=dtype, device=device
        )
        for device in dict.fromkeys(devices)
    }
    taken = dict.fromkeys(blocks, 0)
    tensors = []
    for shape, size, device in zip(shapes, sizes, devices, strict=True):
        tensors.append(blocks[device][taken[device] : taken[device] + size].view(shape))
        taken[device] += size
    return tensors
