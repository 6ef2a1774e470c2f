"""What a piece of work takes from the memory and copies within it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any
from weakref import finalize

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Most bytes that work has allocated at once, above what was allocated before it.

    On CUDA that is the allocator's own record. A CPU has none: there it is what all tensors together take that exist
    at the same time; what a kernel allocates inside itself is missing.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before: int = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        most: int = torch.cuda.max_memory_allocated(device)
        return most - before
    held = HeldBytes()
    with held:
        work()
    return held.peak


class _Watch(TorchDispatchMode, ABC):
    """Sees the result of every operation on tensors inside a `with`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        self.see(func.overloadpacket, args, found)
        return found

    @abstractmethod
    def see(self, operation: Any, inputs: Sequence[Any], result: Any) -> None:
        """Called after each operation."""


class HeldBytes(_Watch):
    """Bytes of the tensors that were made inside and still exist.

    Attributes:
        now: at this moment.
        peak: at most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def see(self, operation: Any, inputs: Sequence[Any], result: Any) -> None:
        old = {_storage(tensor) for tensor in tree_leaves(inputs) if isinstance(tensor, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and _storage(tensor) not in old | self._known:
                self._take(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)

    def _take(self, storage: torch.UntypedStorage) -> None:
        address, taken = storage._cdata, storage.nbytes()
        self._known.add(address)
        self.now += taken

        def give_back() -> None:
            self._known.discard(address)
            self.now -= taken

        finalize(storage, give_back)


class CopiedBytes(_Watch):
    """Counts the bytes that tensors copy from one another inside; shapes alone are enough for that.

    Attributes:
        total: bytes written by copies and concatenations so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def see(self, operation: Any, inputs: Sequence[Any], result: Any) -> None:
        if operation in (torch.ops.aten.copy_, torch.ops.aten.cat):
            self.total += result.nbytes


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
