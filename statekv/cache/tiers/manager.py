"""Blocks of steps, tier below tier: a full one hands its oldest block down, the last one forgets steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from heapq import nsmallest
from itertools import chain

from statekv.cache.spec import KVSpec
from statekv.cache.tiers import TIERS
from statekv.cache.tiers.base import Content, DeviceTier, Held, Tier, only, rows_of
from statekv.cache.tiers.block import OffloadedBlock, SegmentEntry
from statekv.cache.tiers.plan import step_bytes
from statekv.config import Config
from statekv.config import told as bytes_told
from statekv.errors import StorageError, StorageWarning


@dataclass
class _TierShare:
    """One tier's share of one stream."""

    tier: Tier
    cap: int
    blocks: dict[OffloadedBlock, list[SegmentEntry]] = field(default_factory=dict)  # oldest first
    nbytes: int = 0

    def take_in(self, content: Sequence[Content], steps: list[SegmentEntry]) -> bool:
        """Whether there was room; where there was none, although the cap allows it, the cap goes down to what fits."""
        return self._take(lambda: self.tier.put(content, rows_of([step.length for step in steps])), steps)

    def thin(self, block: OffloadedBlock, gone: Container[int]) -> list[SegmentEntry]:
        """Let go of some of a block's steps, by their numbers; returns others that could not be kept."""
        stay = [rows.number for rows in block.rows if rows.number not in gone]
        steps = self.release(block)
        kept = [steps[number] for number in stay]
        if not kept or self._take(lambda: self.tier.thin(block.held, block.rows, stay), kept):
            return []
        return kept

    def _take(self, make: Callable[[], Held], steps: list[SegmentEntry]) -> bool:
        try:
            held = make()
        except StorageError as error:
            self.cap = self.nbytes
            told = f"{error.message}; from now on {self.tier.name} holds {bytes_told(self.cap)} at most, and forgets"
            warnings.warn(StorageWarning(told), stacklevel=2)
            return False
        self.hold(held, steps)
        return True

    def hold(self, held: Held, steps: list[SegmentEntry]) -> None:
        """Know a block, behind all others."""
        block = OffloadedBlock(held, rows_of([step.length for step in steps]), self.tier.name == DeviceTier.name)
        for number, step in enumerate(steps):
            step.block, step.row = block, number
        self.blocks[block] = steps
        self.nbytes += held.nbytes

    def release(self, block: OffloadedBlock) -> list[SegmentEntry]:
        self.nbytes -= block.held.nbytes
        steps = self.blocks.pop(block)
        for step in steps:
            step.block = None
        return steps


class TierManager:
    """The tiers of one stream that its configuration asks for; that on the device has no room before `allow`.

    Raises:
        StorageError: the folder of the tier on disk does not exist.
    """

    def __init__(self, spec: KVSpec, config: Config) -> None:
        self._geometry = spec
        self._bits = config.bits
        self._shares: list[_TierShare] = []  # from the top down
        for kind in TIERS:
            tier = kind.of(config, spec.devices)
            if tier is not None:
                cap = 0 if kind.setting is None else getattr(config, kind.setting)
                self._shares.append(_TierShare(tier, cap))

    def __len__(self) -> int:
        """Blocks."""
        return sum(len(share.blocks) for share in self._shares)

    @property
    def open(self) -> bool:
        """Whether there is any tier."""
        return bool(self._shares)

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of the blocks on each tier."""
        return {share.tier.name: share.nbytes for share in self._shares}

    def allow(self, quantised: int) -> None:
        """Say how many bytes quantised blocks may take on the device."""
        for share in self._shares:
            if share.tier.setting is None:
                share.cap = quantised

    def blocks(self) -> Iterator[tuple[str, OffloadedBlock, list[SegmentEntry]]]:
        """Name of the tier, block and steps of all blocks, those of a tier in order."""
        for share in self._shares:
            yield from ((share.tier.name, block, steps) for block, steps in share.blocks.items())

    def restore(self, tier: str, content: Sequence[Content], steps: list[SegmentEntry]) -> None:
        """Take a saved block in behind those that its tier has already; a StorageError where it cannot be written."""
        share = next(share for share in self._shares if share.tier.name == tier)
        share.hold(share.tier.put(content, rows_of([step.length for step in steps])), steps)

    def put(self, content: Sequence[Content], steps: list[SegmentEntry]) -> list[SegmentEntry]:
        """Take a block in; returns the steps that had to be forgotten for it, among them perhaps its own."""
        return self._put(content, steps, 0)

    def drop(self, steps: Sequence[SegmentEntry]) -> list[SegmentEntry]:
        """Let go of steps wherever they lie; returns others of their blocks that could not be kept."""
        gone = []
        for share in self._shares:
            gone += self._drop(share, [step for step in steps if step.block in share.blocks])
            # A block that was written anew is as old as before.
            share.blocks = dict(sorted(share.blocks.items(), key=lambda block: block[1][0].start))
        return gone

    def fork(self, steps: Mapping[int, SegmentEntry]) -> TierManager:
        """The same blocks for another stream, whose steps are given by their starts."""
        found = copy(self)
        found._shares = [
            replace(share, blocks={block: [steps[step.start] for step in its] for block, its in share.blocks.items()})
            for share in self._shares
        ]
        return found

    def _put(self, content: Sequence[Content], steps: list[SegmentEntry], number: int) -> list[SegmentEntry]:
        share = self._shares[number]
        gone: list[SegmentEntry] = []
        while steps:
            over = share.nbytes + share.tier.size(content) - share.cap
            if over <= 0:
                if share.take_in(content, steps):
                    return gone
            elif number + 1 == len(self._shares):
                least = set(self._least([*chain(*share.blocks.values()), *steps], over))
                gone += [*least, *self._drop(share, [step for step in least if step.block in share.blocks])]
                stay = [row for row, step in enumerate(steps) if step not in least]
                content = only(content, rows_of([step.length for step in steps]), stay) if stay else []
                steps = [steps[row] for row in stay]
            elif share.blocks:
                block = next(iter(share.blocks))
                oldest = block.held.content()  # read before the block lets go
                gone += self._put(oldest, share.release(block), number + 1)
            else:
                return gone + self._put(content, steps, number + 1)
        return gone

    def _least(self, steps: Sequence[SegmentEntry], over: int) -> list[SegmentEntry]:
        """The lowest steps that take so many bytes together."""
        found, freed = [], 0
        likely = nsmallest(1 + over // self._bytes(steps[0]), steps, key=lambda step: step.rank)
        for step in likely if sum(map(self._bytes, likely)) >= over else sorted(steps, key=lambda step: step.rank):
            if freed >= over:
                break
            found.append(step)
            freed += self._bytes(step)
        return found

    def _bytes(self, step: SegmentEntry) -> int:
        return step_bytes(self._geometry, step.length, self._bits)

    def _drop(self, share: _TierShare, steps: Iterable[SegmentEntry]) -> list[SegmentEntry]:
        going: dict[OffloadedBlock, set[int]] = {}
        for step in steps:
            going.setdefault(step.offloaded, set()).add(step.row)
        return [*chain.from_iterable(share.thin(block, rows) for block, rows in going.items())]
