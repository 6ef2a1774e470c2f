"""Fewer tokens of a step, between vision tower and language model: one file a method.

`EncodedStep`, `Memory` and `Reducer` are all that a reducer of your own needs (docs/reducer.md).
"""

from __future__ import annotations

from statekv.models.encoded import EncodedStep
from statekv.reduce.base import Memory, Reducer

__all__ = ["EncodedStep", "Memory", "Reducer"]
