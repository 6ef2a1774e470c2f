"""Places where blocks of whole steps lie, one class each behind one small interface."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import ClassVar, Protocol

import torch

from statekv.config import Config, told
from statekv.errors import StorageError

_HOST = torch.device("cpu")


class Held(Protocol):
    """A block where it lies; it goes when the last who knows it lets go."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes there."""

    def read(self, layer: int, rows: Rows) -> Content:
        """One layer of one of its steps, where it lies or on the CPU.

        Raises:
            StorageError: it is not as it was written.
        """

    def content(self) -> Sequence[Content]:
        """All of it, where it lies or on the CPU.

        Raises:
            StorageError: it is not as it was written.
        """


class Tier(Protocol):
    """Takes blocks in.

    Attributes:
        name: in what a stream says of its bytes, and in saves.
        setting: field of `Config` that caps it; None: the plan of a stream's memory does.
    """

    name: ClassVar[str]
    setting: ClassVar[str | None]

    @classmethod
    def of(cls, config: Config, devices: Sequence[torch.device]) -> Tier | None:
        """The tier of one stream, where its configuration asks for it.

        Args:
            config: of the stream.
            devices: of the model's layers.
        """

    @classmethod
    def place(cls, config: Config) -> torch.device | Path:
        """Whose bytes a cap on it counts: a device's, or those of the file system that a folder is on."""

    def size(self, content: Sequence[Content]) -> int:
        """Bytes that it would take here."""

    def put(self, content: Sequence[Content], rows: Sequence[Rows]) -> Held:
        """Take a block in.

        Args:
            content: its tensors, which lie wherever they did before.
            rows: where its steps lie in them.

        Raises:
            StorageError: it cannot be written.
        """

    def thin(self, block: Held, rows: Sequence[Rows], kept: Sequence[int]) -> Held:
        """A block of this tier without some of its steps; the block itself stays as it is.

        Args:
            block: the block.
            rows: where its steps lie in it.
            kept: numbers of those that stay.

        Raises:
            StorageError: it cannot be written.
        """
        return self.put(only(block.content(), rows, kept), rows_of([rows[number].tokens for number in kept]))


class InMemory:
    """A block in one piece of memory on each device."""

    def __init__(self, buffers: dict[torch.device, torch.Tensor], spots: Spots) -> None:
        self._buffers = buffers  # uint8
        self._spots = spots

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def read(self, layer: int, rows: Rows) -> Content:
        """Views."""
        return rows.of(self._layer(layer))

    def content(self) -> Sequence[Content]:
        """Views of the tensors."""
        return [self._layer(layer) for layer in range(len(self._spots))]

    def _layer(self, layer: int) -> Content:
        return {name: self._tensor(spot) for name, spot in self._spots[layer].items()}

    def _tensor(self, spot: Spot) -> torch.Tensor:
        dtype, shape, device, offset = spot
        data = self._buffers[device][offset : offset + dtype.itemsize * shape.numel()]
        return data.view(dtype).view(shape)


Spot = tuple[torch.dtype, torch.Size, torch.device, int]  # device of the buffer, and bytes in front of the tensor there
Spots = tuple[dict[str, Spot], ...]


@functools.lru_cache(maxsize=64)  # blocks of one shape share it
def _spots(shapes: tuple[tuple[tuple[str, torch.dtype, torch.Size, torch.device], ...], ...]) -> Spots:
    taken: dict[torch.device, int] = {}
    spots: list[dict[str, Spot]] = []
    for layer in shapes:
        spots.append({})
        # Scales and zeros behind the codes: each begins at a multiple of its own size.
        for name, dtype, shape, device in layer:
            offset = -(-taken.get(device, 0) // dtype.itemsize) * dtype.itemsize
            spots[-1][name] = dtype, shape, device, offset
            taken[device] = offset + dtype.itemsize * shape.numel()
    return tuple(spots)


def spots_of(content: Sequence[Content], devices: Sequence[torch.device]) -> Spots:
    """Where a block's tensors go in one buffer for each device.

    Args:
        content: the tensors.
        devices: of each layer.
    """
    return _spots(
        tuple(
            tuple((name, tensor.dtype, tensor.shape, device) for name, tensor in layer.items())
            for layer, device in zip(content, devices, strict=True)
        )
    )


def buffer_bytes(spots: Spots) -> dict[torch.device, int]:
    """Bytes of each device's buffer."""
    found: dict[torch.device, int] = {}
    for dtype, shape, device, offset in chain.from_iterable(layer.values() for layer in spots):
        found[device] = max(found.get(device, 0), offset + dtype.itemsize * shape.numel())
    return found


class DeviceTier(Tier):
    """Blocks stay on the devices of their layers."""

    name = "device"
    setting = None

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._devices = devices

    @classmethod
    def of(cls, config: Config, devices: Sequence[torch.device]) -> DeviceTier | None:
        """Only for blocks that are smaller than what they are made of."""
        return cls(devices) if config.bits is not None else None

    @classmethod
    def place(cls, config: Config) -> torch.device:
        """The plan counts for it."""
        raise TypeError("blocks on the model's devices are part of its memory")

    def size(self, content: Sequence[Content]) -> int:
        """Bytes of the buffers."""
        return sum(buffer_bytes(spots_of(content, self._devices)).values())

    def put(self, content: Sequence[Content], _: Sequence[Rows]) -> InMemory:
        """Copy the tensors."""
        spots = spots_of(content, self._devices)
        buffers = {
            device: torch.empty(size, dtype=torch.uint8, device=device) for device, size in buffer_bytes(spots).items()
        }
        block = InMemory(buffers, spots)
        for layer, tensors in zip(block.content(), content, strict=True):
            for name, tensor in tensors.items():
                layer[name].copy_(tensor)
        return block


class HostTier(Tier):
    """Blocks move to the host's memory: for CUDA devices to pinned memory, on a stream of its own.

    Args:
        pinned: whether the memory is pinned, of which torch only gives powers of two.
    """

    name = "host"
    setting = "host_memory"

    def __init__(self, pinned: bool = False) -> None:
        self._pinned = pinned
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @classmethod
    def of(cls, config: Config, devices: Sequence[torch.device]) -> HostTier | None:
        """Pinned where a layer is on CUDA."""
        return cls(any(device.type == "cuda" for device in devices)) if config.host_memory is not None else None

    @classmethod
    def place(cls, config: Config) -> torch.device:
        """The CPU."""
        return _HOST

    def size(self, content: Sequence[Content]) -> int:
        """Bytes of the buffer."""
        (size,) = buffer_bytes(_on_host(content)).values()
        return 1 << (size - 1).bit_length() if self._pinned else size

    def put(self, content: Sequence[Content], _: Sequence[Rows]) -> InMemory:
        """Copy the tensors; those of a CUDA device are on their way when this returns, whoever reads them waits."""
        spots = _on_host(content)
        sources = {tensor.device for layer in content for tensor in layer.values() if tensor.is_cuda}
        size = self.size(content)
        try:
            buffer = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
        except (MemoryError, RuntimeError):  # torch's own kinds are RuntimeErrors
            raise StorageError(f"{told(size)} of host memory cannot be had", "set a smaller host_memory") from None
        block = _Coming({_HOST: buffer}, spots)
        for layer, tensors in zip(block.content(), content, strict=True):
            for name, tensor in tensors.items():
                self._copy(layer[name], tensor)
        block.done = [self._streams[device].record_event() for device in sources]
        return block

    def _copy(self, target: torch.Tensor, tensor: torch.Tensor) -> None:
        if not tensor.is_cuda:
            target.copy_(tensor)
            return
        stream = self._streams.setdefault(tensor.device, torch.cuda.Stream(tensor.device))
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            target.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)


def _on_host(content: Sequence[Content]) -> Spots:
    return spots_of(content, [_HOST] * len(content))


class _Coming(InMemory):
    """A block that may still be on its way."""

    done: Sequence[torch.cuda.Event] = ()

    def _tensor(self, spot: Spot) -> torch.Tensor:
        for event in self.done:
            event.synchronize()
        self.done = ()
        return super()._tensor(spot)


GROUP = 32  # tokens that share a scale and a zero

Content = dict[str, torch.Tensor]  # of one layer: "tokens", or "codes", "scale" and "zero" (`pack_block`)


@dataclass(frozen=True, slots=True)
class Rows:
    """Where one step lies in a block: its tokens, and its groups where they are quantised.

    Attributes:
        number: which of the block's steps it is.
        first: its first token.
        tokens: how many.
        first_group: its first group.
    """

    number: int
    first: int
    tokens: int
    first_group: int

    @property
    def last(self) -> int:
        """One past its last token."""
        return self.first + self.tokens

    @property
    def last_group(self) -> int:
        """One past its last group."""
        return self.first_group + -(-self.tokens // GROUP)

    def of(self, content: Content) -> Content:
        """Views of this step's part of one layer's tensors."""
        return {
            name: tensor[self.first : self.last]
            if name in ("tokens", "codes")
            else tensor[self.first_group : self.last_group]
            for name, tensor in content.items()
        }


def rows_of(lengths: Sequence[int]) -> list[Rows]:
    """Where steps of these lengths lie in their block."""
    found, first, group = [], 0, 0
    for number, length in enumerate(lengths):
        found.append(Rows(number, first, length, group))
        first, group = found[-1].last, found[-1].last_group
    return found


def only(content: Sequence[Content], rows: Sequence[Rows], kept: Sequence[int]) -> list[Content]:
    """A block's content with some of its steps alone; these are as they were, to the bit."""
    return [joined([rows[number].of(layer) for number in kept]) for layer in content]


def joined(parts: Sequence[Content]) -> Content:
    """Parts of one layer's tensors, one behind another, copied."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
