"""Placeholders of vision features in a row of token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from statekv.errors import ModelError


def check_placeholders(placeholders: int, features: int) -> None:
    """Raise a ModelError unless the text has room for exactly the pictures that came with it."""
    if placeholders != features:
        raise ModelError(
            f"the text has placeholders for {placeholders} vision features, the pictures make {features}",
            "pass all that one call of the checkpoint's own processor returned",
        )


def runs(ids: Sequence[int], tokens: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(start, stop, token) of each unbroken run of one of `tokens`."""
    found = [(i, token) for i, token in enumerate(ids) if token in tokens]
    start = 0
    for k, (i, token) in enumerate(found):
        ends = k + 1 == len(found) or found[k + 1] != (i + 1, token)
        if ends:
            yield found[start][0], i + 1, token
            start = k + 1
