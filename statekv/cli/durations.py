"""Lengths of time as people write them."""

from __future__ import annotations

import re

from statekv.errors import ConfigError

_SECONDS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600}


def seconds_of(text: str, name: str) -> float:
    """Return the seconds of "30s", "2m", "1.5h" or "30".

    Raises:
        ConfigError: anything else, or nothing at all.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(s|m|min|h|)", text.strip())
    if match is None or not float(match[1]):
        raise ConfigError(f"{name} is {text!r}, but must be a length of time", "write 30s, 2m or 1h")
    return float(match[1]) * _SECONDS[match[2]]


def clock(seconds: float) -> str:
    """0:00:07 for 7.4 seconds."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
