"""Amounts of memory as people write them, "8GiB", and as they are counted."""

from __future__ import annotations

import re

from statekv.errors import ConfigError

_UNITS = {"": 1, "B": 1, **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)}}
_UNITS |= {f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", start=1)}
_BY_LOWER = {unit.lower(): factor for unit, factor in _UNITS.items()}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def bytes_of(name: str, amount: int | str) -> int:
    """Bytes of an amount.

    Args:
        name: of the setting, for the error.
        amount: bytes, or a number with a unit: B, KB, MB, GB, TB (powers of 1000), KiB, MiB, GiB, TiB (of 1024).

    Raises:
        ConfigError: not an amount, or nothing.
    """
    found = _AMOUNT.fullmatch(amount) if isinstance(amount, str) else None
    if found is not None and found[2].lower() in _BY_LOWER:
        amount = int(float(found[1]) * _BY_LOWER[found[2].lower()])
    if isinstance(amount, bool) or not isinstance(amount, int) or amount < 1:
        raise ConfigError(f"{name} is {amount!r}, but must be an amount of memory", "write it like 8GiB or 500MB")
    return amount


def told(count: int) -> str:
    """A count of bytes with a unit that suits it."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if count >= _UNITS[unit]:
            return f"{count / _UNITS[unit]:.1f} {unit}"
    return f"{count} B"
