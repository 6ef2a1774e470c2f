"""One representative for each step and layer, made when the step enters, by which a question finds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from transformers import Cache

from statekv.cache.carried import CarriedCache
from statekv.cache.detailed import DetailedCache
from statekv.cache.spec import KVSpec, numbers_in
from statekv.config import Config
from statekv.ops.attention import attention
from statekv.ops.rope import Angles, rotate
from statekv.ops.select import earliest_best

_FIRST_CAPACITY = 64  # steps
_COLUMNS = 4
_MOVED_AT_ONCE = 512  # blocks


@dataclass(frozen=True)
class StepIndexEntry:
    """One step in the detailed cache: its tokens, and how many positions it takes.

    Attributes:
        lost: positions in front of it that forgotten steps have taken. Text between these and the block would move as
            if it came before them; streams have text only in front of the first step and behind the last.
    """

    start: int
    stop: int
    positions: int
    lost: int = 0


class StepIndex:
    """The mean key of every step, as it was before rotation, in every layer.

    ReKV (arXiv 2503.00540; Becomebright/ReKV, `kv_cache_manager.py`) compares the mean key of a block with the mean
    query of a question, both without rotation. So does this, although the keys that it reads are rotated: each is
    turned back by its own position before the mean is taken, which is exact but for rounding.

    A mean of rotated keys would not do. Over the positions of one step the fast pairs turn through whole circles and
    cancel each other, and what is left of the slow ones depends on how far the step lies from the question. Without
    rotation the score is about content alone, and choosing is the same whichever positions retrieved keys get.

    Args:
        most: blocks there will ever be at once; None: no limit.
    """

    def __init__(self, spec: KVSpec, most: int | None = None) -> None:
        self.spec = spec
        self.most = most
        self.texts: list[tuple[int, int]] = []  # tokens between the blocks that belong to no step
        self._table = torch.empty(0, _COLUMNS, dtype=torch.int64)  # a block's fields in each row
        self._count = 0
        self._end = 0  # behind the last block that ever was
        self.means = [self._allocate(layer, 0) for layer in range(spec.layers)]

    def __len__(self) -> int:
        return self._count

    @property
    def table(self) -> torch.Tensor:
        """[blocks, 4] int64 on the CPU: start, stop, positions and lost of each block, in order."""
        return self._table[: self._count]

    @property
    def spots(self) -> list[StepIndexEntry]:
        """All blocks, in order."""
        return [StepIndexEntry(*row) for row in self.table.tolist()]

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(means.nbytes for means in self.means)

    def add(self, detailed: DetailedCache, block: StepIndexEntry, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Take note of a step that all layers have just processed, whose keys were turned by cos and sin [streams, T,
        head_dim] float32.
        """
        for layer, device in enumerate(self.spec.devices):
            rotated = detailed.newest(layer, block.stop - block.start).float()
            keys = rotate(rotated, cos.to(device)[:, None], -sin.to(device)[:, None])
            self._put(layer, keys.mean(-2, keepdim=True))
        self._note([block])

    def scores(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """Product of a mean query with every block's mean key, heads of a group and all groups together.

        Args:
            query: [streams, heads, head_dim] float32, before rotation.

        Returns:
            [streams, blocks] float32.
        """
        means = self.means[layer][:, :, : len(self)]  # [streams, kv_heads, blocks, D]
        grouped = query.unflatten(1, (means.shape[1], -1)).sum(2)  # every query head of a group meets the same key
        by_head: torch.Tensor = means @ grouped[..., None]  # einsum would copy the means
        return by_head[..., 0].sum(1)

    def text_behind(self, tokens: int) -> list[tuple[int, int]]:
        """Tokens behind the last block of a stream of so many, where there are any."""
        return [(self._end, tokens)] if tokens > self._end else []

    def truncate(self, tokens: int) -> None:
        """Forget the blocks that do not lie wholly in the first `tokens` tokens; nothing is copied."""
        while self._count and self._table[self._count - 1, 1] > tokens:
            self._count -= 1
            self._end = int(self._table[self._count, 0])
        while self.texts and self.texts[-1][1] > tokens:
            self._end = self.texts.pop()[0]

    def respace(self, positions: Sequence[int]) -> None:
        """Take note of how many positions each step takes from now on."""
        self.table[:, 2] = torch.tensor(positions)

    def forget(self, starts: Sequence[int]) -> None:
        """Let go of the steps that begin at these tokens, none of which is the newest."""
        gone = torch.isin(self.table[:, 0], torch.tensor(starts))
        kept = (~gone).nonzero()[:, 0]
        # What they took, and what was lost before them, is lost before the next one that stays.
        taken = ((self.table[:, 2] + self.table[:, 3]) * gone).cumsum(0)[kept]
        self.table[kept, 3] += taken.diff(prepend=taken.new_zeros(1))
        for first in range(0, len(kept), _MOVED_AT_ONCE):
            part = kept[first : first + _MOVED_AT_ONCE]
            for means in self.means:
                means[:, :, first : first + len(part)] = means[:, :, part.to(means.device)]
        self._table[: len(kept)] = self.table[kept]
        self._count = len(kept)

    def restore(
        self, spots: Sequence[StepIndexEntry], means: Sequence[torch.Tensor], texts: Sequence[tuple[int, int]] = ()
    ) -> None:
        """Take over saved blocks: a mean [streams, kv_heads, blocks, head_dim] for each layer, and texts between."""
        for layer, saved in enumerate(means):
            self._put(layer, saved)
        self._note(spots)
        self.texts = list(texts)

    def fork(self) -> StepIndex:
        """A copy."""
        found = StepIndex(self.spec, self.most)
        found.restore(self.spots, [means[:, :, : len(self)] for means in self.means], self.texts)
        return found

    def _note(self, spots: Sequence[StepIndexEntry]) -> None:
        needed = self._count + len(spots)
        if needed > len(self._table):
            grown = torch.empty(max(needed, 2 * len(self._table), _FIRST_CAPACITY), _COLUMNS, dtype=torch.int64)
            grown[: self._count] = self.table
            self._table = grown
        for spot in spots:
            if spot.start > self._end:
                self.texts.append((self._end, spot.start))
            self._end = spot.stop
            self._table[self._count] = torch.tensor(astuple(spot))
            self._count += 1

    def _put(self, layer: int, fresh: torch.Tensor) -> None:
        held, first = self.means[layer], len(self)
        if first + fresh.shape[2] > held.shape[2]:
            needed = first + fresh.shape[2]
            # Where there is a limit, at once: means that double leave holes, and the cap holds for those too.
            roomy = max(2 * held.shape[2], _FIRST_CAPACITY) if self.most is None else self.most
            held = self._allocate(layer, max(needed, roomy))
            held[:, :, :first] = self.means[layer][:, :, :first]
            self.means[layer] = held
        held[:, :, first : first + fresh.shape[2]] = fresh

    def _allocate(self, layer: int, blocks: int) -> torch.Tensor:
        g = self.spec
        return torch.empty(g.streams, g.kv_heads, blocks, g.head_dim, device=g.devices[layer])


class RetrievedView(Cache):
    """The best blocks of the detailed cache for one question, and the question and its answer behind them.

    In each layer the question's own queries there choose the `retrieve` blocks with the highest scores. An answer sees
    these, the newest `retrieve_newest` steps, all text that is no step, carried keys where the configuration says so,
    and itself. The choice is made once, by the question's prefill, for all heads of a layer together; the chosen keys
    and values are copied out, so that a token of the answer reads them in one piece.

    After ReKV (arXiv 2503.00540; Becomebright/ReKV). Different there: blocks are chosen by the question's bare text,
    with the chat template around it only prefilled afterwards; and retrieved keys always get new positions.

    Args:
        blocks: representatives of its steps; more than are shown.
        carried: what steps see, where an answer sees it too.
        positions: of the question's tokens, [streams, T] or [3, streams, T].
    """

    def __init__(
        self,
        detailed: DetailedCache,
        blocks: StepIndex,
        carried: CarriedCache | None,
        config: Config,
        angles: Angles,
        positions: torch.Tensor,
    ) -> None:
        super().__init__(layers=[])
        assert detailed.spec.streams == 1, "blocks of several streams differ in length"
        self.detailed, self.blocks, self.carried, self.config = detailed, blocks, carried, config
        self.chosen: list[torch.Tensor | None] = [None] * len(detailed)  # per layer [n] int64, ascending
        self._hidden: list[torch.Tensor | None] = [None] * len(detailed)
        self._angles, self._axes = angles, positions.shape[:-1]
        self._question = angles(positions)
        self._free = len(blocks) - config.retrieve_newest  # blocks that have to be chosen to be seen
        self._texts = [*blocks.texts, *blocks.text_behind(detailed.length)]
        self._seen = DetailedCache(detailed.spec)
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

    def bias(self, layer: int) -> torch.Tensor | None:
        """None: an answer sees every key as it came."""
        return None

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """As `DetailedCache.attend`; the first call of a layer chooses what is seen."""
        key, value, hidden = self.complete(layer, query, key, value)
        return attention(query, key, value, scale=scale, hidden=hidden)

    def evict(self, layer: int, attention: torch.Tensor | None) -> None:
        """Nothing: an answer is cropped away as a whole."""

    def must_evict(self, tokens: int) -> bool:
        """Never."""
        return False

    @property
    def needs_attention(self) -> bool:
        """No key scores are needed."""
        return False

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
        token_ids = self.carried.token_ids[layer][..., :length]
        twice = torch.isin(token_ids.long(), shown) | (token_ids < 0)  # [1, kv_heads, length]
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
