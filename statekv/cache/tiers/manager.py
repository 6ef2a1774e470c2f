"""Blocks of steps, tier below tier: a full one hands its oldest block down, the last one forgets steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from heapq import nsmallest
from itertools import chain
from pathlib import Path

from statekv.cache.spec import Geometry
from statekv.cache.tiers.base import Content, DeviceTier, Held, HostTier, Tier, only, rows_of
from statekv.cache.tiers.block import Passage, Sealed
from statekv.cache.tiers.disk import DiskTier
from statekv.cache.tiers.plan import step_bytes
from statekv.config import Config
from statekv.config import told as bytes_told
from statekv.errors import StorageError, StorageWarning


@dataclass
class _Shelf:
    """One tier's share of one stream."""

    tier: Tier
    cap: int
    blocks: dict[Sealed, list[Passage]] = field(default_factory=dict)  # oldest first
    nbytes: int = 0

    def take_in(self, content: Sequence[Content], steps: list[Passage]) -> bool:
        """Whether there was room; where there was none, although the cap allows it, the cap goes down to what fits."""
        return self._take(lambda: self.tier.put(content, rows_of([step.length for step in steps])), steps)

    def thin(self, block: Sealed, gone: Container[int]) -> list[Passage]:
        """Let go of some of a block's steps, by their numbers; returns others that could not be kept."""
        stay = [rows.number for rows in block.rows if rows.number not in gone]
        steps = self.let_go(block)
        kept = [steps[number] for number in stay]
        if not kept or self._take(lambda: self.tier.thin(block.held, block.rows, stay), kept):
            return []
        return kept

    def _take(self, make: Callable[[], Held], steps: list[Passage]) -> bool:
        try:
            held = make()
        except StorageError as error:
            self.cap = self.nbytes
            told = f"{error.message}; from now on {self.tier.name} holds {bytes_told(self.cap)} at most, and forgets"
            warnings.warn(StorageWarning(told), stacklevel=2)
            return False
        block = Sealed(held, rows_of([step.length for step in steps]), self.tier.name == DeviceTier.name)
        for number, step in enumerate(steps):
            step.block, step.row = block, number
        self.blocks[block] = steps
        self.nbytes += held.nbytes
        return True

    def let_go(self, block: Sealed) -> list[Passage]:
        self.nbytes -= block.held.nbytes
        steps = self.blocks.pop(block)
        for step in steps:
            step.block = None
        return steps


class Shelves:
    """The tiers of one stream.

    Args:
        geometry: sizes of the model's keys.
        config: which tiers there are; that on the device has no room before `allow`.

    Raises:
        StorageError: the folder of the tier on disk does not exist.
    """

    def __init__(self, geometry: Geometry, config: Config) -> None:
        self._geometry = geometry
        self._bits = config.bits
        self._shelves: list[_Shelf] = []
        if config.bits is not None:
            self._shelves.append(_Shelf(DeviceTier(geometry.devices), 0))
        if isinstance(config.host_memory, int):
            self._shelves.append(
                _Shelf(HostTier(any(device.type == "cuda" for device in geometry.devices)), config.host_memory)
            )
        if isinstance(config.disk, int):
            folder = Path(config.disk_folder) if config.disk_folder is not None else None
            self._shelves.append(_Shelf(DiskTier(folder), config.disk))

    def __len__(self) -> int:
        """Blocks."""
        return sum(len(shelf.blocks) for shelf in self._shelves)

    @property
    def open(self) -> bool:
        """Whether there is any tier."""
        return bool(self._shelves)

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of the blocks on each tier."""
        return {shelf.tier.name: shelf.nbytes for shelf in self._shelves}

    def allow(self, quantised: int) -> None:
        """Say how many bytes quantised blocks may take on the device."""
        if self._bits is not None:
            self._shelves[0].cap = quantised

    def blocks(self) -> Iterator[tuple[str, Sealed, list[Passage]]]:
        """Name of the tier, block and steps of all blocks, those of a tier in order."""
        for shelf in self._shelves:
            yield from ((shelf.tier.name, block, steps) for block, steps in shelf.blocks.items())

    def restore(self, tier: str, content: Sequence[Content], steps: list[Passage]) -> None:
        """Take a saved block in behind those that its tier has already.

        Raises:
            StorageError: it cannot be written.
        """
        shelf = next(shelf for shelf in self._shelves if shelf.tier.name == tier)
        shelf.take_in(content, steps)

    def put(self, content: Sequence[Content], steps: list[Passage]) -> list[Passage]:
        """Take a block in; returns the steps that had to be forgotten for it, among them perhaps its own."""
        return self._put(content, steps, 0)

    def drop(self, steps: Sequence[Passage]) -> list[Passage]:
        """Let go of steps wherever they lie; returns others of their blocks that could not be kept."""
        gone = []
        for shelf in self._shelves:
            gone += self._drop(shelf, [step for step in steps if step.block in shelf.blocks])
            # A block that was written anew is as old as before.
            shelf.blocks = dict(sorted(shelf.blocks.items(), key=lambda block: block[1][0].start))
        return gone

    def fork(self, steps: Mapping[int, Passage]) -> Shelves:
        """The same blocks for another stream, whose steps are given by their starts."""
        found = copy(self)
        found._shelves = [
            replace(shelf, blocks={block: [steps[step.start] for step in its] for block, its in shelf.blocks.items()})
            for shelf in self._shelves
        ]
        return found

    def _put(self, content: Sequence[Content], steps: list[Passage], number: int) -> list[Passage]:
        shelf = self._shelves[number]
        gone: list[Passage] = []
        while steps:
            over = shelf.nbytes + shelf.tier.size(content) - shelf.cap
            if over <= 0:
                if shelf.take_in(content, steps):
                    return gone
            elif number + 1 == len(self._shelves):
                least = set(self._least([*chain(*shelf.blocks.values()), *steps], over))
                gone += [*least, *self._drop(shelf, [step for step in least if step.block in shelf.blocks])]
                stay = [row for row, step in enumerate(steps) if step not in least]
                content = only(content, rows_of([step.length for step in steps]), stay) if stay else []
                steps = [steps[row] for row in stay]
            elif shelf.blocks:
                gone += self._move_down(next(iter(shelf.blocks)), number)
            else:
                return gone + self._put(content, steps, number + 1)
        return gone

    def _move_down(self, block: Sealed, number: int) -> list[Passage]:
        content = block.held.content()
        return self._put(content, self._shelves[number].let_go(block), number + 1)

    def _least(self, steps: Sequence[Passage], over: int) -> list[Passage]:
        """The lowest steps that take so many bytes together."""
        found, freed = [], 0
        likely = nsmallest(1 + over // self._bytes(steps[0]), steps, key=lambda step: step.rank)
        for step in likely if sum(map(self._bytes, likely)) >= over else sorted(steps, key=lambda step: step.rank):
            if freed >= over:
                break
            found.append(step)
            freed += self._bytes(step)
        return found

    def _bytes(self, step: Passage) -> int:
        return step_bytes(self._geometry, step.length, self._bits)

    def _drop(self, shelf: _Shelf, steps: Iterable[Passage]) -> list[Passage]:
        going: dict[Sealed, set[int]] = {}
        for step in steps:
            going.setdefault(step.sealed, set()).add(step.row)
        return [*chain.from_iterable(shelf.thin(block, rows) for block, rows in going.items())]
