"""One file in which pieces come and go.

Such a file is memory that happens to be on disk, not a save: which bytes are whose is known to its process alone, and
the file goes with it. It is described in docs/tiers.md.
"""

from __future__ import annotations

import os
import threading
import zlib
from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import chain
from weakref import finalize

from statekv.cache.tiers.disk_room import BLOCKS, DiskRoom
from statekv.cache.tiers.vacancies import Span, Vacancies
from statekv.errors import StorageError


class Scratch:
    """A file in a folder of its process.

    It is read with `pread`, not through a memory map, which is no faster: what has been read does not stay resident,
    and a sector that cannot be read is an error, where a map would have the process killed.

    Args:
        room: the folder, which is made.

    Raises:
        StorageError: the folder or the file cannot be made.
    """

    def __init__(self, room: DiskRoom) -> None:
        self._room = room  # which removes the folder when nobody needs it
        self.path = room.folder / BLOCKS
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise self._unwritten(error) from None
        finalize(self, os.close, self._file)
        self._process = os.getpid()
        self._vacancies = Vacancies()
        self._given: deque[Sequence[Span]] = deque()  # by pieces that went, perhaps in the middle of `write`
        self._writing = threading.Lock()

    def write(self, parts: Sequence[bytes]) -> Piece:
        """Write a piece.

        Args:
            parts: all of one length; each can be read alone.

        Raises:
            StorageError: it cannot be written; it takes nothing then.
        """
        if os.getpid() != self._process:
            hint = "open the stream in the process that goes on with it"
            raise StorageError(f"{self.path} belongs to the process that this one was forked from", hint)
        data = memoryview(b"".join(parts))
        with self._writing:
            self._take_back()
            spans = self._vacancies.take(len(data))
            piece = Piece(self, spans, array("I", map(zlib.crc32, parts)))  # whatever happens, it gives them back
            try:
                for start, stop in spans:
                    self._fill(start, data[: stop - start])
                    data = data[stop - start :]
            except OSError as error:
                del piece
                self._take_back()
                os.ftruncate(self._file, self._vacancies.end)
                raise self._unwritten(error) from None
        return piece

    def read(self, spans: Sequence[Span], check: int) -> bytearray:
        """What lies in spans, one behind another.

        Args:
            spans: from first bytes to one past the last.
            check: CRC-32 of it.

        Raises:
            StorageError: that does not lie there.
        """
        found = bytearray(sum(stop - start for start, stop in spans))
        rest = memoryview(found)
        problem = "does not hold what was written"
        try:
            for start, stop in spans:
                while start < stop and (done := os.preadv(self._file, [rest[: stop - start]], start)):
                    start, rest = start + done, rest[done:]
        except OSError as error:
            problem = f"cannot be read ({error.strerror})"
        if rest or zlib.crc32(found) != check:
            where = ", ".join(f"{start} to {stop}" for start, stop in spans)
            hint = "the steps there are lost, all others are not; check the disk"
            raise StorageError(f"block file {self.path} {problem} at bytes {where}", hint)
        return found

    def give(self, spans: Sequence[Span]) -> None:
        """Take back what a piece had."""
        self._given.append(spans)

    def _take_back(self) -> None:
        while self._given:
            self._vacancies.give(self._given.popleft())

    def _fill(self, start: int, data: memoryview) -> None:
        while data:
            done = os.pwrite(self._file, data, start)
            start, data = start + done, data[done:]

    def _unwritten(self, error: OSError) -> StorageError:
        hint = "make room, or set a smaller disk or another disk_folder"
        return StorageError(f"{self.path} cannot be written: {error.strerror}", hint)


class Piece:
    """Bytes in a file, in parts of one length; they are free once nobody knows the piece any more."""

    __slots__ = ("_bounds", "_checks", "_scratch")

    def __init__(self, scratch: Scratch, spans: Iterable[Span], checks: array[int]) -> None:
        self._scratch = scratch
        self._bounds = array("q", chain.from_iterable(spans))  # a third of what tuples take; there may be many pieces
        self._checks = checks  # CRC-32 of each part

    def __del__(self) -> None:
        self._scratch.give(self._spans)

    @property
    def _spans(self) -> list[Span]:
        return list(zip(self._bounds[::2], self._bounds[1::2], strict=True))

    @property
    def parts(self) -> int:
        """How many."""
        return len(self._checks)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(self._bounds[1::2]) - sum(self._bounds[::2])

    def read(self, part: int) -> bytearray:
        """One of the parts.

        Raises:
            StorageError: it is not as it was written.
        """
        size = self.nbytes // self.parts
        return self._scratch.read(self._within(part * size, (part + 1) * size), self._checks[part])

    def _within(self, first: int, last: int) -> list[Span]:
        """Where bytes `first` to `last` of it are."""
        if len(self._bounds) == 2:
            return [(self._bounds[0] + first, self._bounds[0] + last)]
        found, before = [], 0
        for start, stop in self._spans:
            begin, end = max(start, start + first - before), min(stop, start + last - before)
            if begin < end:
                found.append((begin, end))
            before += stop - start
        return found
