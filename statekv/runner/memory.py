"""Whether something fits into memory, asked before it is made; and one error for when it did not."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from weakref import WeakValueDictionary

import torch

from statekv.cache.stream import StreamState
from statekv.cache.tiers import TIERS
from statekv.cache.tiers.plan import caps_below
from statekv.config import told
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
    """Raise a MemoryLimitError with what would not fit and the way out, unless so many bytes do."""
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


# What of `StreamState.nbytes` lies elsewhere than on the model's device.
_ELSEWHERE = {tier.name for tier in TIERS if tier.setting is not None}


class Admission:
    """Counts what open streams may still grow by.

    A stream with a cap on a place may take the whole cap there. One without may take at least its carried cache at
    full size; its detailed cache grows with the video, and nobody knows how far.
    """

    def __init__(self) -> None:
        self._mutex = Lock()
        self._open: WeakValueDictionary[int, StreamState] = WeakValueDictionary()

    def admit(self, state: StreamState) -> None:
        """Let a stream in, or say why not.

        Raises:
            MemoryLimitError: what it may take, together with what the others may still grow by, is more than is free.
        """
        with self._mutex:
            asked, promised = _growth([state]), _growth(self._open.values())
            for place, bytes_asked in asked.items():
                _check(place, bytes_asked, promised[place])
            self._open[id(state)] = state

    def enter(self, state: StreamState) -> None:
        """Count a stream that is there already, such as a fork."""
        with self._mutex:
            self._open[id(state)] = state

    def leave(self, state: StreamState) -> None:
        """Count a stream no longer; those that are forgotten without a word leave by themselves."""
        with self._mutex:
            self._open.pop(id(state), None)


# A device, or the folder of a file system with its number.
_Place = torch.device | tuple[int, Path]


def _growth(states: Iterable[StreamState]) -> Counter[_Place]:
    """Bytes that streams may still take, by place."""
    found: Counter[_Place] = Counter()
    for state in states:
        config, devices, held = state.config, state.spec.devices, state.nbytes
        here = sum(count for name, count in held.items() if name not in _ELSEWHERE) - _untouched(state)
        least = config.memory if isinstance(config.memory, int) else carried_bytes(state)
        for device in dict.fromkeys(devices):
            found[device] += max(0, least - here) * devices.count(device) // len(devices)
        for tier, cap in caps_below(config).items():
            found[_place(tier.place(config))] += max(0, cap - held.get(tier.name, 0))
    return found


def _untouched(state: StreamState) -> int:
    """Bytes of buffers that no token has been written to: a CPU's system counts them as free until then."""
    cache, spec = state.detailed, state.spec
    if state.config.memory is None or spec.devices[0].type != "cpu":
        return 0
    return cache.nbytes - cache.lengths[-1] * spec.bytes_per_token * spec.streams


def carried_bytes(state: StreamState) -> int:
    """Bytes of a carried cache at full size; never more tokens than a stream that does not compact has positions."""
    config, spec = state.config, state.spec
    if state.policy is None:
        return 0
    layers = state.policy.layer_budgets(config.budget, spec.layers)
    slots = sum(map(state.policy.slots, layers)) // spec.layers
    tokens = slots if state.compacts else min(slots, state.horizon)
    return tokens * spec.bytes_per_token * spec.streams


def _check(place: _Place, asked: int, promised: int) -> None:
    if isinstance(place, torch.device):
        if place.type == "meta":
            return
        free, name = usable(free_bytes(place)), f"{place.type} memory"
    else:
        free, name = shutil.disk_usage(place[1]).free, f"disk at {place[1]}"
    if asked + promised > free:
        others = f", open ones {told(promised)} more" if promised else ""
        rule = f"a new session may take {told(asked)} of {name}{others}, but {told(max(0, free))} can be had"
        raise MemoryLimitError(rule, "close a session, or give lower caps or a lower budget")


def _place(place: torch.device | Path) -> _Place:
    return place if isinstance(place, torch.device) else (os.stat(place.absolute()).st_dev, place.absolute())
