"""lmms-eval, for tests to run: `make test` installs it into a folder of its own.

It brings packages along whose presence changes what transformers does, so that it is not on the tests' own path.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(sys.prefix) / "lmms"

needs_lmms = pytest.mark.skipif(not (FOLDER / "lmms_eval").is_dir(), reason="lmms-eval is not installed: make test")


def run_python(folder: Path, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """A Python process that finds lmms-eval, keeps its caches in a folder and reaches no hub."""
    environment = os.environ | {
        "PYTHONPATH": str(FOLDER),
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TQDM_DISABLE": "1",
    }
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, input=stdin, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
