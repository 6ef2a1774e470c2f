"""The bounded cache that one step hands to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache

from statekv.cache.detailed import DetailedCache
from statekv.cache.policies.base import Rule
from statekv.cache.spec import KVSpec, PositionShift, layer_budgets, one_block
from statekv.ops import select
from statekv.ops.rope import Angles, rotate


class CarriedCache(Cache):
    """At most `budget` keys and values per layer and KV head, the only past that a step sees.

    One block [layers, 2, streams, kv_heads, slots, head_dim] per device. It grows until it holds the budget and the
    longest step; from then on its addresses are constant. The order of the slots means nothing: positions are inside
    the keys, and a step sees all of them.

    Args:
        spec: sizes of the model's keys.
        budget: keys kept per layer and head, the mean of all layers.
        rule: scores that decide who stays.
        detailed: receives every key and value too.
        slope: by how much the first layer's budget is larger than the mean, and the last one's smaller.
        decay: what a kept key's former score counts beside that of a new step. Where it is not 0, each slot's score
            stays with its key, and steps are scored from the first on.
        remembers: keep each slot's score of the newest step, also without decay.
    """

    def __init__(
        self,
        spec: KVSpec,
        budget: int,
        rule: Rule,
        detailed: DetailedCache,
        slope: float = 0.0,
        decay: float = 0.0,
        remembers: bool = False,
    ) -> None:
        super().__init__(layers=[])
        self.spec = spec
        self.budget = budget
        self.budgets = layer_budgets(budget, spec.layers, slope)
        self.rule = rule
        self.detailed = detailed
        self.decay = decay
        self.remembers = remembers or bool(decay)
        self.lengths = [0] * spec.layers
        self.buffers: list[torch.Tensor] = []  # per layer [2, streams, kv_heads, slots, head_dim]
        self.token_ids: list[torch.Tensor] = []  # per layer [streams, kv_heads, slots] int32: which token a slot holds
        self.scores: list[torch.Tensor] = []  # per layer [streams, kv_heads, slots] float32; none unless remembered
        self.newest: dict[torch.device, torch.Tensor] = {}  # first token of the pinned newest steps, 0-d int32
        self.allocate([0] * spec.layers)

    def __len__(self) -> int:
        return self.spec.layers

    @property
    def length(self) -> int:
        """Tokens held per layer and head; where layers differ, by those that hold the most."""
        return max(self.lengths)

    @property
    def slots(self) -> list[int]:
        """Of each layer."""
        return [token_ids.shape[-1] for token_ids in self.token_ids]

    @property
    def nbytes(self) -> int:
        """Bytes allocated, the record of births and accumulated scores included."""
        return sum(tensor.nbytes for tensor in (*self.buffers, *self.token_ids, *self.scores))

    def make_room(self, tokens: int) -> None:
        """Before a step of `tokens` tokens: have a slot for each of them behind the carried ones."""
        needed = [length + tokens for length in self.lengths]
        if any(n > slots for n, slots in zip(needed, self.slots, strict=True)):
            grown = zip(needed, self.slots, self.budgets, strict=True)
            self.allocate([max(n, slots, min(2 * slots, budget + tokens)) for n, slots, budget in grown])

    def pin_from(self, token: int) -> None:
        """From here on tokens with this number and above stay whatever their scores; the host does not wait."""
        for device in dict.fromkeys(self.spec.devices):
            if device not in self.newest:
                self.newest[device] = torch.empty((), dtype=torch.int32, device=device)
            self.newest[device].fill_(token)

    def must_evict(self, tokens: int) -> bool:
        """Whether a step of `tokens` tokens ends with `evict`: where some layer overflows, or scores accumulate."""
        over = any(length + tokens > budget for length, budget in zip(self.lengths, self.budgets, strict=True))
        return over or bool(self.decay)

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
        if self.scores:
            self.scores[layer_idx][:, :, start:stop] = 0
        self.lengths[layer_idx] = stop
        return slots[0, :, :, :stop], slots[1, :, :, :stop]

    def remember(self, key: torch.Tensor, value: torch.Tensor, layer: int) -> torch.Tensor:
        """Enter a layer's own keys and values [streams, kv_heads, T, head_dim] into the detailed cache.

        Returns:
            [T] or [streams, 1, T] int32: which tokens of the stream they are.
        """
        first = self.detailed.number(layer)
        self.detailed.append(key, value, layer)
        return torch.arange(first, first + key.shape[-2], dtype=torch.int32, device=self.token_ids[layer].device)

    def evict(self, layer: int, scores: torch.Tensor | None) -> None:
        """Shrink a layer to its budget.

        Args:
            layer: index of the layer, just attended.
            scores: [streams, kv_heads, length] key scores; None for rules that ignore them.
        """
        length, scores = self.lengths[layer], self.accumulated(layer, scores)
        if length > self.budgets[layer]:
            self.replace(layer, scores, length)
            self.lengths[layer] = self.budgets[layer]

    def accumulated(self, layer: int, scores: torch.Tensor | None) -> torch.Tensor | None:
        """A step's scores, with what their keys had before where it counts; own keys had nothing."""
        if scores is None or not self.scores:
            return scores
        return self.scores[layer][:, :, : scores.shape[-1]].mul_(self.decay).add_(scores)

    def replace(self, layer: int, scores: torch.Tensor | None, length: int) -> None:
        """Make as many first slots of a layer as its budget hold the best of its first `length` keys, in place."""
        budget, token_ids = self.budgets[layer], self.token_ids[layer][:, :, :length]
        values = self.buffers[layer][1, :, :, :length]
        newest = self.newest[token_ids.device] if self.newest else None
        kept = select.best(self.rule(scores, token_ids, layer, values=values, budget=budget, newest=newest), budget)
        source, target = select.moves(kept, budget)
        select.apply_moves(self.buffers[layer], source, target)
        for beside in (token_ids, self.scores[layer][:, :, :length]) if self.scores else (token_ids,):
            beside.scatter_(-1, target, beside.gather(-1, source))

    def rotate(self, moves: PositionShift, angles: Angles) -> None:
        """Rotate carried keys further, in float32 and in place.

        Args:
            moves: how far each token of the stream moves.
            angles: of such distances.
        """
        for layer, length in enumerate(self.lengths):
            token_ids = self.token_ids[layer][..., :length]
            moved = moves.of(token_ids)  # [streams, kv_heads, length]
            cos, sin = (part.view(*token_ids.shape, -1).to(token_ids.device) for part in angles(moved.flatten()))
            keys = self.buffers[layer][0, :, :, :length]
            keys.copy_(rotate(keys.float(), cos, sin))

    def importance(self, starts: Sequence[int]) -> dict[int, tuple[float, int]]:
        """Segments of which something is carried, by start: their keys' scores in the newest judged step, and how many.

        Args:
            starts: number of each segment's first token, ascending; each ends where the next begins.
        """
        first = torch.tensor(starts, dtype=torch.int64)
        scores, counts = torch.zeros(2, len(starts) + 1, dtype=torch.float64)
        for layer, length in enumerate(self.lengths):
            segment = torch.searchsorted(first, self.token_ids[layer][..., :length].flatten().cpu().long(), right=True)
            scores.scatter_add_(0, segment, self.scores[layer][..., :length].flatten().cpu().double())
            counts += segment.bincount(minlength=len(counts))
        held = counts[1:].nonzero()[:, 0]
        found = zip(held.tolist(), scores[1:][held].tolist(), counts[1:][held].long().tolist(), strict=True)
        return {starts[number]: (score, count) for number, score, count in found}

    @property
    def full(self) -> bool:
        """Whether every layer holds exactly its budget: from here on all steps of one length look alike."""
        return self.lengths == self.budgets

    def kept(self, layer: int) -> torch.Tensor:
        """[streams, kv_heads, length] int32, ascending: which of the stream's tokens a layer carries."""
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
        found = CarriedCache(self.spec, self.budget, self.rule, detailed, decay=self.decay, remembers=self.remembers)
        found.budgets = self.budgets
        found.allocate(self.slots)
        found.lengths = list(self.lengths)
        for mine, its in (
            (self.buffers, found.buffers),
            (self.token_ids, found.token_ids),
            (self.scores, found.scores),
        ):
            for old, new in zip(mine, its, strict=True):
                new.copy_(old)
        return found

    def allocate(self, slots: Sequence[int]) -> None:
        """Have so many slots in each layer; what the layers hold moves along."""
        g = self.spec
        rows = [(g.streams, g.kv_heads, n) for n in slots]
        buffers = one_block([(2, *row, g.head_dim) for row in rows], g.dtype, g.devices)
        token_ids = one_block(rows, torch.int32, g.devices)
        scores = one_block(rows, torch.float32, g.devices) if self.remembers else []
        for layer, length in enumerate(self.lengths if self.buffers else []):
            buffers[layer][..., :length, :] = self.buffers[layer][..., :length, :]
            for new, old in zip((token_ids, scores), (self.token_ids, self.scores), strict=True):
                if new:
                    new[layer][..., :length] = old[layer][..., :length]
        # Last of all: a save on another thread may be reading.
        self.buffers, self.token_ids, self.scores = buffers, token_ids, scores
