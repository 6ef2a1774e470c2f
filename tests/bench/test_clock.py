"""Candidates take turns; nothing here looks at how long they took."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from statekv.bench.clock import alternate, matmul_rate, wait

CPU = torch.device("cpu")


def test_candidates_take_turns() -> None:
    called: list[str] = []
    found = alternate({name: partial(called.append, name) for name in "abc"}, runs=3, device=CPU, warm=2)
    assert called == [*"aabbcc", *"abcabcabc"]
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 3, "b": 3, "c": 3}
    assert all(second >= 0 for seconds in found.values() for second in seconds)


def test_nothing_to_time() -> None:
    assert alternate({}, runs=5, device=CPU) == {}


def test_a_candidate_that_fails_says_so() -> None:
    with pytest.raises(ZeroDivisionError):
        alternate({"fails": lambda: 1 // 0}, runs=1, device=CPU)


def test_a_cpu_is_never_behind() -> None:
    wait(CPU)


def test_the_rate_is_a_number_of_flops() -> None:
    rate = matmul_rate(CPU, torch.float32, rows=1, runs=1)
    assert math.isfinite(rate)
    assert rate > 0
