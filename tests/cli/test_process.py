"""What the command tells malloc and OpenMP, in processes of their own: it changes the whole process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc can be told")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python with these arguments and variables."""
    command, variables = [sys.executable, *arguments], {**os.environ, **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=True)


# Of two that are forked from one process, the other one does by itself what the variable would have glibc do.
_FAULTS = """
import ctypes, os, resource, sys
import torch
from statekv.cli import keep_freed_memory

def work():  # 64 MiB in blocks that are alive together, as a step's activations are
    blocks = [torch.ones(8 << 18) for _ in range(8)]

for settle in (keep_freed_memory, lambda: ctypes.CDLL(None).mallopt(-3, 1 << 20)):
    if os.fork() == 0:
        done = settle()
        for _ in range(3):
            work()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        work()
        print(bool(done), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        sys.stdout.flush()
        os._exit(0)
    os.wait()
"""


def test_freed_blocks_come_back_without_page_faults() -> None:
    kept, plain = (line.split() for line in run("-c", _FAULTS, OMP_NUM_THREADS="1").stdout.splitlines())
    assert kept[0] == plain[0] == "True"
    assert int(kept[1]) < 100
    # What glibc does by itself moves with what was freed before; mapped anew, every page is touched anew.
    assert int(plain[1]) >= 1000


def test_a_choice_in_the_environment_is_left_alone() -> None:
    code = "from statekv.cli import keep_freed_memory; print(keep_freed_memory())"
    assert run("-c", code, MALLOC_TRIM_THRESHOLD_="65536").stdout == "False\n"


_OWN = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
# As torch loads it, without the rest of torch.
_LOADS = "import ctypes, sys; from statekv.cli import wait_briefly; wait_briefly(); ctypes.CDLL(sys.argv[1])"


def settings(monkeypatch: pytest.MonkeyPatch, *line: str, **environment: str) -> str:
    """What OpenMP says of itself when it is loaded."""
    for name in _OWN:
        monkeypatch.delenv(name, raising=False)
    told = run(*line, OMP_DISPLAY_ENV="verbose", **environment).stderr
    if "GOMP_SPINCOUNT" not in told:
        pytest.skip("not GNU's OpenMP")
    return told


def test_waiting_threads_spin_for_microseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a command that needs torch."""
    assert "GOMP_SPINCOUNT = '1000'" in settings(monkeypatch, "-m", "statekv", "models")


@pytest.mark.parametrize("chosen", [{"GOMP_SPINCOUNT": "77"}, {"OMP_WAIT_POLICY": "ACTIVE"}], ids=str)
def test_a_choice_in_the_environment_is_left_alone_threads(
    chosen: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    found = list(Path(torch.origin).parent.joinpath("lib").glob("libgomp*"))
    if not found:
        pytest.skip("torch comes without GNU's OpenMP")
    ((name, value),) = chosen.items()
    told = settings(monkeypatch, "-c", _LOADS, str(found[0]), **chosen)
    assert f"{name} = '{value}'" in told
    assert "GOMP_SPINCOUNT = '1000'" not in told
