"""What needs no model does not wait for torch: help, the version, and errors that can be seen at once."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from statekv.config import SETTINGS
from tests.cli.test_cli import command, succeed

ROOT = Path(__file__).parent.parent.parent
HEAVY = ("torch", "transformers", "av", "numpy", "matplotlib")
PROGRAM = """
import sys
from statekv.cli import main
sys.argv[1:] = {arguments!r}
try:
    main()
except SystemExit as left:
    print(left.code, [name for name in {heavy!r} if name in sys.modules])
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["-h"], 0),
        (["--version"], 0),
        (["--show-completion", "bash"], 0),
        (["ask", "-h"], 0),
        (["ask", "no.mp4", "how many?", "--save", "kept"], 1),
        (["watch", "no.mp4", "--save", "kept", "--restore", "kept"], 1),
        (["analyze", "no.mp4"], 1),
        (["bench", "video", "no.mp4"], 1),
        (["ask", "no.mp4", "how many?", "--budget", "0"], 1),
        (["ask", "no.mp4", "  "], 1),
    ],
    ids=str,
)
def test_torch_is_not_waited_for(arguments: list[str], code: int) -> None:
    program = PROGRAM.format(arguments=arguments, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == f"{code} []", done.stderr


def test_the_version_is_told() -> None:
    assert succeed("--version") == f"statekv {version('statekv')}\n"


@pytest.mark.parametrize("arguments", [(), ("ask",), ("eval", "run"), ("bench", "video")], ids=str)
def test_h_is_help(arguments: tuple[str, ...]) -> None:
    assert succeed(*arguments, "-h") == succeed(*arguments, "--help")


@pytest.mark.parametrize("name", ["ask", "watch"])
def test_every_setting_is_an_option(name: str) -> None:
    found = command(name, "--help").out.split()
    assert not [setting.option for setting in SETTINGS.values() if setting.option not in found]
