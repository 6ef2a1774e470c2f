"""Threads that wait give their core away: a program may decide that, a library may not."""

from __future__ import annotations

import os

_SPINS = "1000"  # some microseconds; what libgomp does by itself when it knows of more threads than cores
_OWN_CHOICE = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def wait_briefly() -> bool:
    """Tell GNU's OpenMP, which has not been loaded yet, how long threads may spin for each other.

    By itself it lets them spin for about a millisecond. Beside another process, the thread that they wait for is often
    one that cannot run because of that: `statekv watch` took 120 to 320 ms for a step of 6 ms on two cores. Alone
    nothing changes. A choice made in the environment is left alone.
    """
    if any(name in os.environ for name in _OWN_CHOICE):
        return False
    os.environ["GOMP_SPINCOUNT"] = _SPINS
    return True
