"""One block of whole steps as a file on disk: tensors of every layer, of which any rows can be read alone.

The format is described in docs/tiers.md. Such a file is memory that happens to be on disk, not a save: it is whole or
not there whenever its process dies, but nothing makes it survive a power cut.
"""

from __future__ import annotations

import functools
import json
import mmap
import os
import re
import struct
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from statekv.errors import StorageError

FORMAT = 1
_MAGIC = b"statekv\n"
_HEAD = struct.Struct("<8s3I")  # magic, format, bytes of the JSON that follows, CRC-32 of it
_ALIGNMENT = 64  # bytes: of each tensor in the file
_CHUNK = 1 << 13  # bytes, about: what one CRC-32 covers, and so what is read at least
_NAME = re.compile(r"[\w.-]+\.block(\.part)?")

Layers = Sequence[Mapping[str, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class _Spot:
    """Where a tensor lies: its bytes from `offset` on, `rows` rows to a CRC, of which number `check` is the first."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    rows: int
    check: int

    @property
    def row(self) -> int:
        """Bytes of a row."""
        return self.dtype.itemsize * torch.Size(self.shape[1:]).numel()

    @property
    def nbytes(self) -> int:
        return self.row * self.shape[0]

    @property
    def checks(self) -> int:
        return -(-self.shape[0] // self.rows)


@dataclass(frozen=True)
class _Layout:
    """Where the tensors of each layer lie, where they end, and how many chunks they are."""

    spots: tuple[dict[str, _Spot], ...]
    end: int
    checks: int

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return self.end + 4 * self.checks


@dataclass(frozen=True)
class BlockFile:
    """A file of tensors; nothing of it stays open or mapped between calls.

    Attributes:
        path: of the file.
        facts: what was written beside the tensors.
        nbytes: of the file; `block_bytes` says it beforehand.
        spots: where the tensors of each layer lie.
        checks: CRC-32 of each chunk of rows.
    """

    path: Path
    facts: dict[str, Any]
    nbytes: int
    spots: tuple[dict[str, _Spot], ...]
    checks: array[int]

    def read(self, layer: int, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of a tensor, a copy on the CPU.

        Read are these rows and what shares a chunk of at most 8 KiB, or one row, with them.

        Raises:
            StorageError: the file is missing, of another length, or does not hold what was written.
        """
        spot = self.spots[layer][name]
        assert 0 <= start <= stop <= spot.shape[0], f"rows {start} to {stop} of {spot.shape[0]}"
        found = torch.empty((stop - start) * spot.row, dtype=torch.uint8)
        if found.numel():
            with _reading(self.path), self.path.open("rb") as file:
                _check_length(self.path, file, self.nbytes)
                self._copy(file, spot, start * spot.row, stop * spot.row, found.numpy().data)
        return found.view(spot.dtype).view(stop - start, *spot.shape[1:])

    def remove(self) -> None:
        """Delete the file; once is enough."""
        self.path.unlink(missing_ok=True)

    def _copy(self, file: BinaryIO, spot: _Spot, start: int, stop: int, target: memoryview) -> None:
        """Copy bytes `start` to `stop` of a tensor, each chunk right after its check."""
        size = spot.rows * spot.row
        first, last = start // size, -(-stop // size)
        begin, end = spot.offset + first * size, spot.offset + min(last * size, spot.nbytes)
        base = begin - begin % mmap.ALLOCATIONGRANULARITY
        with (
            mmap.mmap(file.fileno(), end - base, access=mmap.ACCESS_READ, offset=base) as mapped,
            memoryview(mapped)[begin - base :] as held,
        ):
            for chunk in range(first, last):
                at = chunk * size
                with held[at - first * size :][:size] as data:
                    if zlib.crc32(data) != self.checks[spot.check + chunk]:
                        raise _damaged(self.path, "does not hold what was written")
                    wanted = slice(max(start - at, 0), min(stop - at, len(data)))
                    target[at + wanted.start - start : at + wanted.stop - start] = data[wanted]


def write_block(folder: Path, name: str, facts: Mapping[str, Any], tensors: Layers) -> BlockFile:
    """Write tensors as one file; whenever the process dies, the file is whole or not there.

    Args:
        folder: where.
        name: of the file, without its ending; a file of that name is replaced.
        facts: anything that JSON holds.
        tensors: by name, for each layer; any dtype and device, one axis at least.

    Raises:
        StorageError: it cannot be written; nothing of it is left.
    """
    path = folder / f"{name}.block"
    unfinished = folder / f"{name}.block.part"
    told = _told(tensors)
    head = _head(facts, told)
    layout = _laid_out(len(head), json.dumps(told))
    try:
        try:
            with unfinished.open("wb") as file:
                _write(file, head, layout.spots, tensors)
            os.replace(unfinished, path)
        finally:
            with suppress(OSError):
                unfinished.unlink()
    except OSError as error:
        hint = "make room, or set a smaller disk or another disk_folder"
        raise StorageError(f"{path} cannot be written: {error.strerror}", hint) from None
    return open_block(path)


def open_block(path: Path) -> BlockFile:
    """A block that was written before; its tensors are checked when they are read.

    Raises:
        StorageError: there is none, or its head or length are not as they were written.
    """
    with _reading(path), path.open("rb") as file:
        start = file.read(_HEAD.size)
        magic, found, length, check = _HEAD.unpack(start) if len(start) == _HEAD.size else (b"", 0, 0, 0)
        if magic != _MAGIC or found != FORMAT:
            raise _damaged(path, f"is no block of format {FORMAT}")
        text = file.read(length)
        if zlib.crc32(text) != check:
            raise _damaged(path, "does not begin as it was written")
        told = json.loads(text)
        layout = _laid_out(len(start) + length, json.dumps(told["layers"]))
        _check_length(path, file, layout.nbytes)
        file.seek(layout.end)
        checks = struct.unpack(f"<{layout.checks}I", file.read(4 * layout.checks))
    return BlockFile(path, told["facts"], layout.nbytes, layout.spots, array("I", checks))


def block_bytes(facts: Mapping[str, Any], tensors: Layers) -> int:
    """Bytes of the file that `write_block` would write; tensors may be on the meta device."""
    told = _told(tensors)
    return _laid_out(len(_head(facts, told)), json.dumps(told)).nbytes


def is_block(name: str) -> bool:
    """Whether a file of that name was written, or begun, by `write_block`."""
    return bool(_NAME.fullmatch(name))


def _told(tensors: Layers) -> list[dict[str, list[Any]]]:
    """What the head says of each tensor: name of its dtype, and shape."""
    return [
        {name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in layer.items()}
        for layer in tensors
    ]


def _head(facts: Mapping[str, Any], told: list[dict[str, list[Any]]]) -> bytes:
    text = json.dumps({"facts": facts, "layers": told}, separators=(",", ":")).encode()
    return _HEAD.pack(_MAGIC, FORMAT, len(text), zlib.crc32(text)) + text


@functools.lru_cache(64)  # thousands of files of one shape should not each remember it
def _laid_out(offset: int, told: str) -> _Layout:
    """Where tensors of which the head tells, as JSON, lie behind a head that ends at `offset`."""
    spots: list[dict[str, _Spot]] = []
    check = 0
    for layer in json.loads(told):
        spots.append({})
        for name, (dtype, shape) in layer.items():
            offset = -(-offset // _ALIGNMENT) * _ALIGNMENT
            row = getattr(torch, dtype).itemsize * torch.Size(shape[1:]).numel()
            spot = _Spot(getattr(torch, dtype), tuple(shape), offset, max(1, _CHUNK // row), check)
            offset, check = offset + spot.nbytes, check + spot.checks
            spots[-1][name] = spot
    return _Layout(tuple(spots), offset, check)


def _write(file: BinaryIO, head: bytes, spots: Sequence[Mapping[str, _Spot]], tensors: Layers) -> None:
    checks: list[int] = []
    file.write(head)
    for placed, layer in zip(spots, tensors, strict=True):
        for name, tensor in layer.items():
            spot = placed[name]
            file.write(bytes(spot.offset - file.tell()))
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            file.write(data)
            checks += (zlib.crc32(chunk) for chunk in _chunks(data, spot.rows * spot.row))
    file.write(struct.pack(f"<{len(checks)}I", *checks))


def _chunks(data: memoryview, size: int) -> Iterator[memoryview]:
    return (data[start : start + size] for start in range(0, len(data), size))


def _check_length(path: Path, file: BinaryIO, nbytes: int) -> None:
    """A map of a file that is too short would kill the process where it is read."""
    found = os.fstat(file.fileno()).st_size
    if found != nbytes:
        raise _damaged(path, f"has {found} bytes instead of {nbytes}")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise _damaged(path, "is missing") from None
    except OSError as error:
        raise _damaged(path, f"cannot be read: {error.strerror}") from None


def _damaged(path: Path, problem: str) -> StorageError:
    return StorageError(f"block file {path} {problem}", "the steps in it are lost, all others are not; check the disk")
