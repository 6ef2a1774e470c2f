"""Shares of right answers, over rows of questions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Rows = Sequence[Mapping[str, Any]]


def share(rows: Rows, verdict: str = "score") -> float:
    """Share of rows with a verdict; nan of none."""
    return sum(bool(row[verdict]) for row in rows) / len(rows) if rows else math.nan


def shares(rows: Rows, field: str, verdict: str = "score") -> dict[str, float]:
    """The same for each value of a field, in the order of their first appearance."""
    parts: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        parts.setdefault(row[field], []).append(row)
    return {name: share(part, verdict) for name, part in parts.items()}


def macro_share(rows: Rows, field: str, verdict: str = "score") -> float:
    """Unweighted mean of those; nan of none."""
    parts = shares(rows, field, verdict)
    return sum(parts.values()) / len(parts) if parts else math.nan
