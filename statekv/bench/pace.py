"""Turns for candidates of very different speed: all alternate, the slow ones sit some rounds out."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from statekv.bench.clock import alternate


def alternate_within(
    candidates: Mapping[str, Callable[[], object]], *, runs: int, seconds: float, device: torch.device
) -> dict[str, list[float]]:
    """As `alternate`, with a limit to the time that one candidate takes in all.

    Args:
        candidates: what to call, by name.
        runs: timed calls of each that is quick enough.
        seconds: a candidate whose runs would take longer than this gets fewer, one at least, spread over the rounds.
        device: waited for before and after each call.

    Returns:
        Seconds of each timed call, by name.
    """
    # The first call may compile and record: where there is time, a second one says how long it really takes.
    took = alternate(candidates, runs=1, device=device, warm=0)
    quick = {name: call for name, call in candidates.items() if 2 * took[name][0] <= seconds}
    took |= alternate(quick, runs=1, device=device, warm=0)
    turns = {name: turns_within(seconds, once, runs) for name, (once,) in took.items()}
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(runs):
        due = {name: call for name, call in candidates.items() if is_due(number, turns[name], runs)}
        for name, timed in alternate(due, runs=1, device=device, warm=0).items():
            found[name] += timed
    return found


def turns_within(seconds: float, once: float, most: int) -> int:
    """How many calls of `once` seconds fit, from 1 to `most`."""
    return max(1, min(most, int(seconds / once)))


def is_due(number: int, turns: int, rounds: int) -> bool:
    """Whether a candidate with `turns` turns in `rounds` rounds has one in round `number`, counted from 0."""
    return (number + 1) * turns // rounds > number * turns // rounds
