"""Who has a turn when."""

from __future__ import annotations

from itertools import pairwise

import pytest

from statekv.bench.pace import alternate_within, is_due, turns_within
from tests.bench.small import CPU


def test_everybody_quick_has_every_turn_and_all_alternate() -> None:
    calls: list[str] = []
    candidates = {name: lambda name=name: calls.append(name) for name in "ab"}
    found = alternate_within(candidates, runs=3, seconds=60, device=CPU)
    assert calls == list("ab") * 5  # two rounds go first, untimed
    assert {name: len(timed) for name, timed in found.items()} == {"a": 3, "b": 3}


def test_who_is_too_slow_for_the_limit_has_one_turn_and_no_second_rehearsal() -> None:
    calls: list[str] = []
    found = alternate_within({"slow": lambda: calls.append("slow")}, runs=20, seconds=0, device=CPU)
    assert len(found["slow"]) == 1
    assert len(calls) == 2


@pytest.mark.parametrize(("seconds", "once", "turns"), [(60, 0.1, 20), (60, 10, 6), (60, 45, 1), (60, 90, 1)])
def test_turns_fill_the_time(seconds: float, once: float, turns: int) -> None:
    assert turns_within(seconds, once, 20) == turns


@pytest.mark.parametrize("turns", range(1, 21))
def test_turns_are_spread(turns: int) -> None:
    rounds = [number for number in range(20) if is_due(number, turns, 20)]
    assert len(rounds) == turns
    gaps = [after - before for before, after in pairwise(rounds)]
    assert not gaps or max(gaps) - min(gaps) <= 1
