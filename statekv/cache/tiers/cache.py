"""A detailed cache within a cap: the newest tokens as they came, older steps in blocks, the least of them forgotten."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from heapq import nsmallest
from itertools import groupby
from weakref import WeakKeyDictionary

import torch

from statekv.cache.detailed import DetailedCache, Importance
from statekv.cache.policies.base import Policy
from statekv.cache.spec import KVSpec, PositionShift, token_id_dtype
from statekv.cache.tiers.block import OffloadedBlock, SegmentEntry, first_of, groups_of, pack_block
from statekv.cache.tiers.fetch import BlockFetcher, FetchCache
from statekv.cache.tiers.manager import TierManager
from statekv.cache.tiers.plan import MemoryPlan, plan
from statekv.config import Config
from statekv.errors import StorageError
from statekv.ops.attention import attention_over
from statekv.ops.rope import Angles

_RELIEVED = 1 / 16  # of what is held: those that stay are copied, or looked through, each time
LABEL_GROWTH = 4  # tokens that the label of a late frame has more than that of the first


class TieredCache(DetailedCache):
    """As `DetailedCache`, for a stream that may be longer than its memory.

    The buffers have one size, and hold the newest steps as they came, and all text. Where a step finds no room, the
    oldest steps leave them in blocks (`TierManager`); where there is nowhere to go, those whose keys score least are
    forgotten. A question changes nothing: the room for it is kept free.

    Raises:
        StorageError: the folder of the tier on disk does not exist.
    """

    def __init__(self, spec: KVSpec, config: Config, policy: Policy) -> None:
        super().__init__(spec)
        self.config, self.policy = config, policy
        self.plan: MemoryPlan | None = None
        self.entries: dict[int, SegmentEntry] = {}  # by start, ascending
        self.manager = TierManager(spec, config)
        self.fetcher = BlockFetcher(spec, config.bits)
        self.longest = 0  # tokens that a step may have before another plan is made
        self.saved_blocks: WeakKeyDictionary[OffloadedBlock, str] = (
            WeakKeyDictionary()
        )  # SHA-256 of files that hold them
        self._lost: list[SegmentEntry] = []  # found damaged
        self._gone: list[int] = []  # starts of forgotten steps of which nobody has been told
        self._here: list[SegmentEntry] = []  # those in the buffers, in order
        self._steps = 0
        self.id_bytes = 0  # of a token's number, as the plan has it

    @property
    def bytes_by_tier(self) -> dict[str, int]:
        """Bytes of blocks on each tier, and of steps that questions have brought in."""
        return {"recent": self.fetcher.recent.nbytes, **self.manager.nbytes}

    @property
    def most_steps(self) -> int | None:
        return None if self.plan is None else self.plan.most_steps

    def make_way(self, tokens: int, room: int, importance: Importance) -> list[int]:
        """Before a step of so many tokens: have room for it, and for a question and its answer (`room`) after it; what
        is least worth keeping goes first.

        Returns:
            Starts of the steps that had to be forgotten.

        Raises:
            ConfigError: the cap is too small for such steps; nothing has changed.
        """
        id_bytes = token_id_dtype(self.length).itemsize
        if self.plan is None or tokens > self.longest or id_bytes > self.id_bytes:
            self._make_plan(max(tokens + LABEL_GROWTH, self.longest), room, importance)
        assert self.plan is not None
        self._relieve(self.lengths[-1] + tokens + self.plan.answers - self.plan.plain, importance)
        if self.plan.most_steps is not None and self._steps >= self.plan.most_steps:
            self._forget(max(self._steps + 1 - self.plan.most_steps, int(_RELIEVED * self._steps)))
        return self.settle()

    def settle(self) -> list[int]:
        """Starts of the steps that were forgotten since the last time, damaged ones among them."""
        self.fetcher.turned = None
        self._let_go(self._lost)
        gone, self._gone, self._lost = sorted(self._gone), [], []
        return gone

    def lose_damaged(self, steps: Iterable[SegmentEntry]) -> int:
        """Forget, with the next `settle`, those of some steps in blocks that cannot be read; returns how many."""
        self._lost += (damaged := [step for step in steps if not self.fetcher.can_read(step)])
        self._lost += self.manager.drop(damaged)
        return len(damaged)

    def note(self, kind: str, tokens: int) -> None:
        """Take note of which segment the newest tokens are."""
        if not tokens:
            return
        entry = SegmentEntry(self.length - tokens, tokens, kind, self.lengths[-1] - tokens)
        self.entries[entry.start] = entry
        self._here.append(entry)
        self._steps += kind == "step"

    def reserve(self, tokens: int) -> None:
        """Nothing: the plan says how much there is."""

    def make_room(self, tokens: int) -> None:
        """Before a question and its answer, of so many tokens; a MemoryLimitError where that is more than is kept free
        for them.
        """
        if self.plan is not None:
            self.plan.check_room(self.lengths[-1], tokens)
        super().make_room(tokens)

    def pieces(self, layer: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values [streams, kv_heads, n, head_dim] of all steps in blocks, a few thousand tokens at a time."""
        assert self.plan is not None
        waiting: list[SegmentEntry] = []
        for step in (*self.entries.values(), None):
            tokens = sum(each.length for each in waiting)
            if waiting and (step is None or tokens + step.length > self.plan.staged):
                with self._reading(waiting):
                    key, value = self.fetcher.bring(layer, waiting)
                yield key, value
                waiting = []
            if step is not None and step.block is not None:
                waiting.append(step)

    def gather(self, layer: int, starts: Sequence[int], stops: Sequence[int]) -> torch.Tensor:
        """As `DetailedCache.gather`, from wherever they lie; what lies in blocks is kept for the next question."""
        # Text behind the last step may be several passages, one behind another in the buffers.
        wanted = [(self.entries[start], stop - start) for start, stop in zip(starts, stops, strict=True)]
        found = []
        for here, run in groupby(wanted, key=lambda each: each[0].block is None):
            if here:
                places = ((entry.place, entry.place + tokens) for entry, tokens in run)
                found.append(super().gather(layer, *zip(*places, strict=True)))
            else:
                steps = [entry for entry, _ in run]
                with self._reading(steps):
                    found.append(self.fetcher.recall(layer, steps))
        return torch.cat(found, dim=-2) if len(found) > 1 else found[0]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """As `DetailedCache.attend`, also over what lies in blocks."""
        if not len(self.manager):
            return super().attend(layer, query, key, value, scale)
        return attention_over(query, self.pieces(layer), key, value, scale=scale)

    def begin_answer(self, moved: Angles) -> None:
        super().begin_answer(moved)
        self.fetcher.turned = moved

    def rotate(self, moves: PositionShift, angles: Angles) -> None:
        """As `DetailedCache.rotate`; steps in blocks are turned when they are read."""
        by = moves.of(torch.tensor(list(self.entries))).tolist()
        for entry, far in zip(self.entries.values(), by, strict=True):
            if entry.block is not None:
                entry.moved += far
        self.fetcher.recent.clear()
        super().rotate(moves, angles)

    def truncate(self, max_length: int) -> None:
        """As `DetailedCache.truncate`, as long as what goes lies in the buffers."""
        super().truncate(max_length)
        while self._here and self._here[-1].start >= max_length:
            self._steps -= self._here[-1].kind == "step"
            del self.entries[self._here.pop().start]

    def resume(
        self, plan: MemoryPlan | None, longest: int, forgotten: int, entries: Sequence[SegmentEntry], id_bytes: int
    ) -> None:
        """Stand where another cache of this configuration stood; blocks, buffers and `settled` come next."""
        self.plan, self.longest, self.forgotten, self.id_bytes = plan, longest, forgotten, id_bytes
        self.entries = {entry.start: entry for entry in entries}
        self._steps = sum(entry.kind == "step" for entry in entries)
        if plan is not None:
            self._allot(plan)

    def settled(self, away: int) -> None:
        """All is back: say how many tokens the buffers do not hold."""
        self.away = away
        self._here = [entry for entry in self.entries.values() if entry.block is None]

    def fork(self) -> TieredCache:
        """As `DetailedCache.fork`; blocks are never written to, so both read the same."""
        found = TieredCache(self.spec, self.config, self.policy)
        found.plan, found.longest, found._steps, found.away = self.plan, self.longest, self._steps, self.away
        found.lengths, found.buffers = list(self.lengths), list(self.buffers)
        found.saved_blocks, found.forgotten = self.saved_blocks.copy(), self.forgotten
        found.id_bytes = self.id_bytes
        found.entries = {start: replace(entry) for start, entry in self.entries.items()}
        found._here = [found.entries[entry.start] for entry in self._here]
        found.manager = self.manager.fork(found.entries)
        if self.plan is not None:
            found.fetcher.recent = FetchCache(self.spec, self.plan.recent, self.longest)
        self._share(found)
        return found

    def _make_plan(self, step: int, room: int, importance: Importance) -> None:
        texts = sum(entry.length for entry in self._here if entry.kind != "step")
        id_bytes = token_id_dtype(self.length).itemsize
        made = plan(self.config, self.spec, self.policy, texts, step, room, id_bytes)
        if self.plan is not None:
            self._relieve(self.lengths[-1] + step + made.answers - made.plain, importance)
        self.plan, self.longest, self.id_bytes = made, step, id_bytes
        self._allot(made)

    def _allot(self, made: MemoryPlan) -> None:
        for layer in range(self.spec.layers):
            self._move(layer, made.plain)  # at once: buffers that double leave holes, and the cap holds for those too
        self.fetcher.recent = FetchCache(self.spec, made.recent, self.longest)
        self.manager.allow(made.quantised)

    def _relieve(self, tokens: int, importance: Importance) -> None:
        """Have so many tokens leave the buffers, or some more."""
        if tokens <= 0 or self.plan is None:
            return
        for start, worth in importance(list(self.entries)).items():
            self.entries[start].worth = max(self.entries[start].worth, worth)
        wanted = max(tokens, int(_RELIEVED * self.plan.plain), self.plan.block_tokens)
        steps = [entry for entry in self._here if entry.kind == "step"][:-1]
        if self.manager.open:
            self._seal(first_of(steps, wanted), self.plan.block_tokens)
            return
        going = first_of(sorted(steps, key=lambda step: step.rank), wanted)
        self.written.forget(min((step.start for step in going), default=self.length))
        self._close_up(going)
        self._let_go(going)

    def _seal(self, going: list[SegmentEntry], block_tokens: int) -> None:
        """Move steps to the tiers."""
        gone, offloaded = list[SegmentEntry](), list[SegmentEntry]()
        try:
            for group in groups_of(going, block_tokens):
                first, stop = group[0].place, group[-1].place + group[-1].length
                tokens = [held[..., first:stop, :] for held in self.buffers]
                gone += self.manager.put(pack_block(tokens, [step.length for step in group], self.config.bits), group)
                offloaded += group
        finally:  # out of memory or not, nothing lies in two places
            self._close_up(offloaded)
            self._let_go(gone)

    def _let_go(self, gone: list[SegmentEntry]) -> None:
        """Forget steps that lie nowhere any more."""
        for entry in gone:
            del self.entries[entry.start]
        self.fetcher.recent.drop({entry.start for entry in gone})
        self.forgotten += len(gone)
        self._steps -= len(gone)
        self._gone += [entry.start for entry in gone]

    def _forget(self, steps: int) -> None:
        """Forget the steps whose keys score least, wherever they lie, but for the newest."""
        newest = next(entry for entry in reversed(self._here) if entry.kind == "step")
        known = (entry for entry in self.entries.values() if entry.kind == "step" and entry is not newest)
        going = nsmallest(steps, known, key=lambda step: step.rank)
        here = [entry for entry in going if entry.block is None]
        gone = going + self.manager.drop([entry for entry in going if entry.block is not None])
        if here:
            self.written.forget(min(step.start for step in here))
            self._close_up(here)
        self._let_go(gone)

    def _close_up(self, gone: Iterable[SegmentEntry]) -> None:
        """Move what stays in the buffers to their front."""
        left, runs, place = set(gone), [], 0
        stay = [entry for entry in self._here if entry not in left]
        for entry in stay:
            if entry.place != place:
                runs.append((entry.place, place, entry.length))
            entry.place, place = place, place + entry.length
        if runs:
            for layer in range(self.spec.layers):
                self._claim(layer, 0)
        close_gaps(self.buffers, runs, self.at_once)
        self.away += self.lengths[-1] - place
        self.lengths = [place] * len(self.lengths)
        self._here = stay

    @contextmanager
    def _reading(self, steps: Sequence[SegmentEntry]) -> Iterator[None]:
        """Steps that turn out not to be as they were written are forgotten once the question is over."""
        try:
            yield
        except StorageError as error:
            hint = f"damaged steps forgotten: {self.lose_damaged(steps)}; ask again"
            raise StorageError(error.message, hint) from None

    def _numbers(self) -> torch.Tensor:
        noted = [torch.arange(entry.start, entry.start + entry.length) for entry in self._here]
        return torch.cat([*noted, torch.arange(sum(map(len, noted)) + self.away, self.length)])


Run = tuple[int, int, int]  # tokens that lie at the first place move to the second, and how many they are


@torch.inference_mode()
def close_gaps(buffers: Sequence[torch.Tensor], runs: Sequence[Run], at_once: int) -> None:
    """Move tokens towards the front, so many at once: they are copied aside, for source and target may overlap.

    Args:
        buffers: of each layer [2, streams, kv_heads, capacity, head_dim].
        runs: from front to back, each to a place before its own.
    """
    for source, target, length in _joined(runs):
        for shift in range(0, length, at_once):
            count = min(at_once, length - shift)
            for held in buffers:
                moved = held[..., source + shift : source + shift + count, :].clone()
                held[..., target + shift : target + shift + count, :] = moved


def _joined(runs: Sequence[Run]) -> Iterator[Run]:
    """Neighbouring runs that move equally far, as one."""
    for _, group in groupby(runs, key=lambda run: run[0] - run[1]):
        members = list(group)
        yield members[0][0], members[0][1], sum(length for _, _, length in members)
