"""Whether something fits into a device's memory, asked before it is made; and one error for when it did not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from statekv.errors import MemoryLimitError

_MEMINFO = Path("/proc/meminfo")
_SPARED = 0.9  # share of the free memory


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be had; on a CPU what the system can give without swapping."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    lines = _MEMINFO.read_text(encoding="utf-8").splitlines() if _MEMINFO.exists() else []
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def usable(free: int) -> int:
    """What of so many free bytes may be taken: activations need some too."""
    return int(_SPARED * free)


def fits(needed: int, device: torch.device) -> bool:
    """Whether so many bytes can be had and leave some for the work; shapes alone need none."""
    return device.type == "meta" or needed <= usable(free_bytes(device))


def check_fits(what: str, needed: int, device: torch.device, hint: str) -> None:
    """Raise a MemoryLimitError unless so many bytes fit.

    Args:
        what: named in the error.
        needed: bytes.
        hint: the way out.
    """
    if not fits(needed, device):
        raise MemoryLimitError(_told(what, needed, device), hint)


def refusal(what: str, needed: int, device: torch.device) -> str:
    """A row's remark where something does not fit; empty where it does."""
    return "" if fits(needed, device) else f"left out: {_told(what, needed, device)}"


@contextmanager
def memory_limit() -> Iterator[None]:
    """Turn the many ways of running out of memory into one error that says what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's own kinds are RuntimeErrors
        told = str(error).lower()
        if isinstance(error, RuntimeError) and "allocate memory" not in told and "out of memory" not in told:
            raise
        raise MemoryLimitError(
            "out of memory in a step", "lower budget, max_frames or the video's resolution, or use a half dtype"
        ) from error


def _told(what: str, needed: int, device: torch.device) -> str:
    return f"{what} would take {_gib(needed)}, but {device.type} has {_gib(free_bytes(device))} free"


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
