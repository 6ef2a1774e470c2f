"""statekv/cli/threads.py, in processes of their own: OpenMP reads its settings once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_OWN = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def settings(**environment: str) -> str:
    """What OpenMP says of itself when it is loaded by a command that needs torch."""
    others = {name: value for name, value in os.environ.items() if name not in _OWN}
    done = subprocess.run(
        [sys.executable, "-m", "statekv", "models"],
        env={**others, "OMP_DISPLAY_ENV": "verbose", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("not GNU's OpenMP")
    return done.stderr


def test_waiting_threads_spin_for_microseconds() -> None:
    assert "GOMP_SPINCOUNT = '1000'" in settings()


@pytest.mark.parametrize("chosen", [{"GOMP_SPINCOUNT": "77"}, {"OMP_WAIT_POLICY": "ACTIVE"}], ids=str)
def test_a_choice_in_the_environment_is_left_alone(chosen: dict[str, str]) -> None:
    (name, value), found = *chosen.items(), settings(**chosen)
    assert f"{name} = '{value}'" in found
    assert "GOMP_SPINCOUNT = '1000'" not in found
