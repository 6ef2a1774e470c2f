"""The tier on disk: all blocks of a stream in one file, which any step can leave without the others being touched.

One file in which pieces come and go.

Such a file is memory that happens to be on disk, not a save: which bytes are whose is known to its process alone, and
the file goes with it. It is described in docs/fixed-memory.md.
"""

from __future__ import annotations

import functools
import os
import re
import stat
import tempfile
import threading
import weakref
import zlib
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from weakref import finalize

import torch

from statekv.cache.tiers.base import Content, Held, Rows, Tier, joined
from statekv.config import Config
from statekv.errors import StorageError

Form = tuple[tuple[str, torch.dtype, torch.Size], ...]  # of a step's tensors in one layer, alike in all layers


class DiskTier(Tier):
    """Steps move to a file in a private folder, which goes with the last of them; it is made in `parent`, else where
    the system keeps temporary files.

    Raises:
        StorageError: it does not exist.
    """

    name = "disk"
    setting = "disk"

    def __init__(self, parent: Path | None) -> None:
        self._room = SpillDir(parent)
        self._scratch: SpillFile | None = None
        self._making = threading.Lock()

    @classmethod
    def of(cls, config: Config, devices: Sequence[torch.device]) -> DiskTier | None:
        """In the folder that the configuration names."""
        return cls(_folder(config)) if config.disk is not None else None

    @classmethod
    def place(cls, config: Config) -> Path:
        """The folder, or where the system keeps temporary files."""
        return _folder(config) or Path(tempfile.gettempdir())

    def size(self, content: Sequence[Content]) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for layer in content for tensor in layer.values())

    def put(self, content: Sequence[Content], rows: Sequence[Rows]) -> OnDisk:
        """Write a piece of the file for each step, its layers one behind another."""
        with self._making:
            if self._scratch is None:
                self._scratch = SpillFile(self._room)
        steps, forms = [], []
        for each in rows:
            layers = [each.of(layer) for layer in content]
            steps.append(self._scratch.write([_bytes(layer) for layer in layers]))
            forms.append(_form(tuple((name, tensor.dtype, tensor.shape) for name, tensor in layers[0].items())))
        return OnDisk(steps, forms)

    def thin(self, block: Held, _: Sequence[Rows], kept: Sequence[int]) -> OnDisk:
        """The same pieces, but for those that go."""
        assert isinstance(block, OnDisk)
        return OnDisk([block.steps[number] for number in kept], [block.forms[number] for number in kept])


def _folder(config: Config) -> Path | None:
    return Path(config.disk_folder) if config.disk_folder is not None else None


class OnDisk:
    """A block in a file: where each step lies, a part for each layer, and each one's form."""

    def __init__(self, steps: Sequence[Piece], forms: Sequence[Form]) -> None:
        self.steps = steps
        self.forms = forms
        self.nbytes = sum(step.nbytes for step in steps)

    def read(self, layer: int, rows: Rows) -> Content:
        """One layer of one step, on the CPU."""
        return self._read(layer, rows.number)

    def content(self) -> Sequence[Content]:
        """All of it, on the CPU."""
        return [
            joined([self._read(layer, number) for number in range(len(self.steps))])
            for layer in range(self.steps[0].parts)
        ]

    def _read(self, layer: int, number: int) -> Content:
        data, found, offset = self.steps[number].read(layer), {}, 0
        for name, dtype, shape in self.forms[number]:
            count = shape.numel()
            found[name] = torch.frombuffer(data, dtype=dtype, count=count, offset=offset).view(shape)
            offset += count * dtype.itemsize
        return found


@functools.lru_cache(64)  # thousands of steps of one form need not each remember it
def _form(form: Form) -> Form:
    return form


def _bytes(layer: Content) -> bytes:
    return b"".join(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data for tensor in layer.values())


class SpillFile:
    """A file in a folder of its process, which is made.

    It is read with `pread`, not through a memory map, which is no faster: what has been read does not stay resident,
    and a sector that cannot be read is an error, where a map would have the process killed.

    Raises:
        StorageError: the folder or the file cannot be made.
    """

    def __init__(self, room: SpillDir) -> None:
        self._room = room  # which removes the folder when nobody needs it
        self.path = room.folder / BLOCKS
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise self._unwritten(error) from None
        finalize(self, os.close, self._file)
        self._process = os.getpid()
        self._free = FreeList()
        self._given: deque[Sequence[Span]] = deque()  # by pieces that went, perhaps in the middle of `write`
        self._writing = threading.Lock()

    def write(self, parts: Sequence[bytes]) -> Piece:
        """Write a piece, whose parts have one length, so that each can be read alone; what cannot be written is a
        StorageError, and takes nothing.
        """
        if os.getpid() != self._process:
            hint = "open the stream in the process that goes on with it"
            raise StorageError(f"{self.path} belongs to the process that this one was forked from", hint)
        data = memoryview(b"".join(parts))
        with self._writing:
            self._take_back()
            spans = self._free.take(len(data))
            piece = Piece(self, spans, array("I", map(zlib.crc32, parts)))  # whatever happens, it gives them back
            try:
                for start, stop in spans:
                    self._fill(start, data[: stop - start])
                    data = data[stop - start :]
            except OSError as error:
                del piece
                self._take_back()
                os.ftruncate(self._file, self._free.end)
                raise self._unwritten(error) from None
        return piece

    def read(self, spans: Sequence[Span], check: int) -> bytearray:
        """What lies in spans (first byte, one past the last), one behind another; a StorageError where that is not what
        this CRC-32 is of.
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
            self._free.give(self._given.popleft())

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

    def __init__(self, scratch: SpillFile, spans: Iterable[Span], checks: array[int]) -> None:
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
        """One of the parts; a StorageError where it is not as it was written."""
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


Span = tuple[int, int]  # first byte, and one past the last


class FreeList:
    """Free spans of a file that is never longer than the most bytes that were ever taken at once.

    What is given back is used before the file grows, if need be in several spans. Most pieces of one file have one
    size, so that one that goes leaves just the room that the next one needs.
    """

    def __init__(self) -> None:
        self.end = 0  # bytes of the file
        self._stops: dict[int, int] = {}  # of free spans, by their starts; no two of them touch
        self._starts: dict[int, int] = {}
        self._by_size: dict[int, dict[int, None]] = {}  # starts of the free spans of each size, the oldest first

    def take(self, size: int) -> list[Span]:
        """So many bytes: the smallest free span that has them, or the largest ones, or what lies behind the end."""
        found: list[Span] = []
        while size:
            enough = min((each for each in self._by_size if each >= size), default=None)
            if enough is not None:
                found.append(self._cut(enough, size))
            elif self._by_size:
                largest = max(self._by_size)
                found.append(self._cut(largest, largest))
            else:
                found.append((self.end, self.end + size))
                self.end += size
            size -= found[-1][1] - found[-1][0]
        return found

    def give(self, spans: Iterable[Span]) -> None:
        """Take spans back."""
        for start, stop in spans:
            if stop in self._stops:
                stop = self._remove(stop)[1]
            if start in self._starts:
                start = self._remove(self._starts[start])[0]
            if stop == self.end:
                self.end = start
            else:
                self._add(start, stop)

    def _cut(self, length: int, size: int) -> Span:
        """The first bytes of a free span of a length."""
        start, stop = self._remove(next(iter(self._by_size[length])))
        if size < length:
            self._add(start + size, stop)
        return start, start + size

    def _add(self, start: int, stop: int) -> None:
        self._stops[start], self._starts[stop] = stop, start
        self._by_size.setdefault(stop - start, {})[start] = None

    def _remove(self, start: int) -> Span:
        stop = self._stops.pop(start)
        del self._starts[stop]
        same = self._by_size[stop - start]
        del same[start]
        if not same:
            del self._by_size[stop - start]
        return start, stop


BLOCKS = "blocks"  # the file in the folder
_PREFIX = "statekv-"
_ROOM = re.compile(rf"{_PREFIX}[a-z0-9_]{{8}}")  # as `tempfile.mkdtemp` names folders
_LOCK = "lock"


class SpillDir:
    """A folder in `parent`, else among the system's temporary ones, that is made when it is first asked for and removed
    with the object, on `close` or when Python exits.

    A process that is killed cannot remove its folder. Therefore each one holds a lock, which the system lets go of
    whenever the process ends, and whoever makes a new one first removes those of the same parent that nobody holds.
    Nothing is ever removed but files of blocks, locks, and folders of that kind that are empty then; links stay.

    Raises:
        StorageError: the parent does not exist, or is no folder.
    """

    def __init__(self, parent: Path | None = None) -> None:
        self.parent = Path(tempfile.gettempdir()) if parent is None else parent.absolute()
        self._making = threading.Lock()
        self._folder: Path | None = None
        self._leave: weakref.finalize[[Path, int, int], SpillDir] | None = None
        if not self.parent.is_dir():
            problem = "is not a folder" if self.parent.exists() else "does not exist"
            raise StorageError(f"disk_folder is {self.parent}, which {problem}", "make it, or name another one")

    @property
    def folder(self) -> Path:
        """The folder, made where there is none yet; a StorageError where it cannot be made."""
        with self._making:
            if self._folder is None:
                with _writing(self.parent):
                    _sweep(self.parent)
                    self._folder, lock = _made(self.parent)
                self._leave = weakref.finalize(self, _leave, self._folder, lock, os.getpid())
            return self._folder

    def close(self) -> None:
        """Remove the folder with the file of blocks in it, if there is one."""
        if self._leave is not None:
            self._leave()
        self._folder = None


def _made(parent: Path) -> tuple[Path, int]:
    """A new folder, and the descriptor of its lock, held."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        lock = os.open(folder / _LOCK, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            if _locked(lock) and os.fstat(lock).st_nlink:
                return folder, lock
        except OSError:
            _remove(folder)
            os.close(lock)
            raise
        os.close(lock)  # somebody swept before it was locked


def _leave(folder: Path, lock: int, process: int) -> None:
    if os.getpid() == process:  # a fork of it has the object too, but not the folder
        _remove(folder)
        os.close(lock)


def _sweep(parent: Path) -> None:
    """Remove the folders that processes of this user have left behind."""
    with os.scandir(parent) as found:
        rooms = [Path(entry.path) for entry in found if _ROOM.fullmatch(entry.name) and _own_folder(entry)]
    for room in rooms:
        with suppress(OSError):  # no lock, or gone in the meantime: not ours to remove
            lock = os.open(room / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
            try:
                if stat.S_ISREG(os.fstat(lock).st_mode) and _locked(lock):
                    _remove(room)
            finally:
                os.close(lock)


def _own_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_uid == os.getuid()


def _remove(folder: Path) -> None:
    """Remove the file of blocks, and the folder with its lock where nothing else is left."""
    with suppress(OSError):
        blocks = folder / BLOCKS
        if blocks.is_file() and not blocks.is_symlink():
            blocks.unlink()
        if [path.name for path in folder.iterdir()] == [_LOCK]:
            os.unlink(folder / _LOCK)
            folder.rmdir()


def _locked(descriptor: int) -> bool:
    """Take the lock of an open file, unless another process has it."""
    import fcntl  # not on every system; one without it can do without this tier

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _writing(parent: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = "make it writable, or name another disk_folder"
        raise StorageError(f"no folder can be made in {parent}: {error.strerror}", hint) from None
