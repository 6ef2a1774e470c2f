"""The tier on disk: a file for each block."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from weakref import finalize

import torch

from statekv.cache.block_file import BlockFile, block_bytes, write_block
from statekv.cache.disk_room import DiskRoom
from statekv.cache.tier import Content


class DiskTier:
    """Blocks move to files in a private folder, which goes with the last of them.

    Args:
        parent: where the folder is made; None: where the system keeps temporary files.
    """

    name = "disk"

    def __init__(self, parent: Path | None) -> None:
        self._room = DiskRoom(parent)
        self._serial = count()

    def size(self, content: Sequence[Content]) -> int:
        """Bytes of the file."""
        return block_bytes({}, content)

    def put(self, content: Sequence[Content]) -> OnDisk:
        """Write a file."""
        return OnDisk(write_block(self._room.folder, f"{next(self._serial):08d}", {}, content), self._room)


class OnDisk:
    """A block in a file, which is removed once nobody knows it any more."""

    def __init__(self, file: BlockFile, room: DiskRoom) -> None:
        self._file = file
        self._room = room  # which removes the folder when nobody needs it
        finalize(self, _remove, file, os.getpid())

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return self._file.nbytes

    def read(self, layer: int, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of one of a layer's tensors, on the CPU."""
        return self._file.read(layer, name, start, stop)

    def content(self) -> Sequence[Content]:
        """All of it, on the CPU."""
        return [
            {name: self._file.read(layer, name, 0, spot.shape[0]) for name, spot in spots.items()}
            for layer, spots in enumerate(self._file.spots)
        ]


def _remove(file: BlockFile, process: int) -> None:
    if os.getpid() == process:  # a fork of it has the object too, but not the file
        file.remove()
