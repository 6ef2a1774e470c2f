"""The tier on disk: all blocks of a stream in one file, which any step can leave without the others being touched."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from statekv.cache.tiers.disk_room import DiskRoom
from statekv.cache.tiers.rows import Content, Rows, joined
from statekv.cache.tiers.scratch import Piece, Scratch
from statekv.cache.tiers.tier import Held

Form = tuple[tuple[str, torch.dtype, torch.Size], ...]  # of a step's tensors in one layer, alike in all layers


class DiskTier:
    """Steps move to a file in a private folder, which goes with the last of them.

    Args:
        parent: where the folder is made; None: where the system keeps temporary files.

    Raises:
        StorageError: it does not exist.
    """

    name = "disk"

    def __init__(self, parent: Path | None) -> None:
        self._room = DiskRoom(parent)
        self._scratch: Scratch | None = None
        self._making = threading.Lock()

    def size(self, content: Sequence[Content]) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for layer in content for tensor in layer.values())

    def put(self, content: Sequence[Content], rows: Sequence[Rows]) -> OnDisk:
        """Write a piece of the file for each step, its layers one behind another."""
        with self._making:
            if self._scratch is None:
                self._scratch = Scratch(self._room)
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


class OnDisk:
    """A block in a file.

    Attributes:
        steps: where each one lies, a part for each layer.
        forms: of each step.
    """

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
