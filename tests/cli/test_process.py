"""statekv/cli/heap.py, in processes of their own: it changes the whole process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc can be told")

PROGRAM = """
import resource
import torch
from statekv.cli import keep_freed_memory

kept = {call}
def work():  # 64 MiB in blocks that are alive together, as a step's activations are
    blocks = [torch.ones(8 << 18) for _ in range(8)]
for _ in range(3):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(call: str, **environment: str) -> tuple[str, int]:
    """What `call` gave, and page faults of the same work once it is settled."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(call=call)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    kept, faults = done.stdout.split()
    return kept, int(faults)


def test_freed_blocks_come_back_without_page_faults() -> None:
    kept, faults = run("keep_freed_memory()")
    assert kept == "True"
    assert faults < 100
    # What glibc does by itself moves with what was freed before; mapped anew, every page is touched anew.
    assert run("None", MALLOC_MMAP_THRESHOLD_="1048576")[1] >= 1000


def test_a_choice_in_the_environment_is_left_alone() -> None:
    assert run("keep_freed_memory()", MALLOC_TRIM_THRESHOLD_="65536")[0] == "False"


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
def test_a_choice_in_the_environment_is_left_alone_threads(chosen: dict[str, str]) -> None:
    (name, value), found = *chosen.items(), settings(**chosen)
    assert f"{name} = '{value}'" in found
    assert "GOMP_SPINCOUNT = '1000'" not in found
