"""What needs no model does not wait for torch; what is said on standard error, to whom; numbers as JSON has them."""

from __future__ import annotations

import errno
import functools
import gc
import json
import math
import os
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn
from unittest import mock

import pytest
import torch
from typer.main import get_command
from typer.testing import CliRunner

from statekv import cli
from statekv.cli import console
from statekv.cli.console import progress, to_json
from statekv.config import SETTINGS
from statekv.errors import OutputError
from tests.cli.test_cli import command, succeed
from tests.cli.test_errors import complaint

FULL = Path("/dev/full")
ROOT = Path(__file__).parent.parent.parent
HEAVY = ("torch", "transformers", "av", "numpy", "matplotlib")
# Each line in a child of a process that knows nothing but the command.
PROGRAM = """
import os, sys
from statekv.cli import main
for number, line in enumerate({lines!r}):
    if os.fork() == 0:
        sys.argv[1:] = line
        try:
            main()
        except SystemExit as left:
            print(f"\\nend {{number}}:", left.code, [name for name in {heavy!r} if name in sys.modules], flush=True)
        os._exit(0)
    os.wait()
"""


# typer's own switch: the shell is the one that is named, whatever the tests themselves were started from.
NAMED_SHELL = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}


LINES = [
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
]


@functools.cache
def ends_of_lines() -> dict[str, str]:
    """By the number of a line: its exit code, and what of the heavy it has imported."""
    program = PROGRAM.format(lines=[arguments for arguments, _ in LINES], heavy=HEAVY)
    line, env = [sys.executable, "-c", program], {**os.environ, **NAMED_SHELL}
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, cwd=ROOT, env=env)
    return dict(re.findall(r"^end (\d+): (.*)$", done.stdout, re.MULTILINE))


@pytest.mark.parametrize("number", range(len(LINES)), ids=lambda number: " ".join(LINES[number][0]))
def test_torch_is_not_waited_for(number: int) -> None:
    assert ends_of_lines()[str(number)] == f"{LINES[number][1]} []"


def test_the_version_is_told() -> None:
    assert succeed("--version") == f"statekv {version('statekv')}\n"


@pytest.mark.parametrize("arguments", [(), ("ask",), ("eval", "run"), ("bench", "video")], ids=str)
def test_h_is_help(arguments: tuple[str, ...]) -> None:
    assert succeed(*arguments, "-h") == succeed(*arguments, "--help")


@pytest.mark.parametrize("name", ["ask", "watch"])
def test_every_setting_is_an_option(name: str) -> None:
    found = command(name, "--help").out.split()
    assert not [setting.option for setting in SETTINGS.values() if setting.option not in found]


def test_quiet_leaves_remarks_out_and_keeps_complaints(tmp_path: Path) -> None:
    film = tmp_path / "film.mp4"
    assert "is written" in command("film", film, "--seconds", "2").err
    assert "is there already" in command("film", film).err
    assert succeed("film", film, "--quiet") == succeed("-q", "film", film) == ""
    assert "is a folder" in complaint(command("ask", tmp_path, "how many?", "-q"))


def test_verbose_shows_what_the_library_logs(tmp_path: Path) -> None:
    assert command("film", tmp_path / "film.mp4", "--seconds", "2", "-q").code == 0
    found = command("ask", tmp_path / "film.mp4", "how many cards?", "-v")
    loaded, opened = found.err.splitlines()
    assert loaded == "statekv: statekv.engine.engine: demo: InternVL, keys in torch.float32 on cpu"
    assert opened == "statekv: statekv.engine.engine: film.mp4: 2 frames, horizon 32768"
    assert succeed("ask", tmp_path / "film.mp4", "how many cards?") == found.out


def test_either_quiet_or_verbose() -> None:
    assert "choose one" in complaint(command("models", "-q", "-v"))


@pytest.mark.parametrize("word", ["--no-color", "--quiet", "-v"])
def test_behind_two_dashes_they_are_words(word: str) -> None:
    found = CliRunner().invoke(cli.app, ["film", "--", word, "one more"])
    assert (found.exit_code, "unexpected extra argument" in found.output) == (2, True)


@pytest.mark.parametrize("line", [("models", "--no-color"), ("--no-color", "models")])
def test_colors_are_switched_off(line: tuple[str, ...]) -> None:
    with mock.patch.dict(os.environ):
        os.environ.pop("NO_COLOR", None)
        assert CliRunner().invoke(cli.app, [*line, "-h"]).exit_code == 0
        CliRunner().invoke(cli.app, ["--no-color", "film", "/"])
        assert os.environ["NO_COLOR"]
        assert console.notes.no_color
        assert console.complaints.no_color


def test_without_a_terminal_work_is_told_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not it moves."""
    monkeypatch.setattr(console, "SECONDS_OF_SILENCE", 0.01)
    said: list[str] = []
    monkeypatch.setattr(console, "remark", said.append)
    with progress() as bar:
        task = bar.add_task("frames", total=8)
        bar.update(task, completed=3)
        while not said:
            time.sleep(0.001)
    assert said[0] == "frames 3 of 8 after 0 s"


def test_numbers_have_the_digits_that_mean_something() -> None:
    found = to_json({"a": 0.123456789, "b": [123.456789, 123456.78912], "c": 7, "d": math.nan, "e": 1e-9 / 3})
    assert found == '{"a": 0.123457, "b": [123.457, 123456.789], "c": 7, "d": null, "e": 3.33333e-10}'
    assert json.loads(to_json({"ok": True, "text": "Grün"})) == {"ok": True, "text": "Grün"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = {"COMP_WORDS": "statekv ana", "COMP_CWORD": "1", "_TYPER_COMPLETE_ARGS": "statekv ana"}
    asked = {"_STATEKV_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_FISH_ACTION": "get-args", **words}
    with mock.patch.dict(os.environ, asked), pytest.raises(SystemExit):
        cli.app(prog_name="statekv")
    assert "analyze" in capsys.readouterr().out
    # What typer makes of the commands depends on the variable, and is made once for all other tests.
    with mock.patch.dict(os.environ, NAMED_SHELL), mock.patch("tests.cli.test_cli._made_once", get_command):
        assert "_STATEKV_COMPLETE" in succeed("--show-completion", shell)


def test_a_small_model_has_one_thread_unless_the_environment_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        console.load(model="demo")
        assert torch.get_num_threads() == 2
        monkeypatch.delenv("OMP_NUM_THREADS")
        monkeypatch.setattr(console, "_SMALL", 1000)
        console.load(model="demo")
        assert torch.get_num_threads() == 2
        monkeypatch.undo()
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        console.load(model="demo")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_garbage_is_left_while_things_are_loaded() -> None:
    """And collected again afterwards; what was made before is not frozen by that, where torch was there already."""
    frozen = gc.get_freeze_count()
    with console.doing("loading"):
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() == frozen


# Standard output and standard error


def shell(line: str) -> subprocess.CompletedProcess[str]:
    """The command as a shell starts it, with what the shell makes of its streams."""
    line = f"{sys.executable} -m statekv {line}"
    return subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")
@pytest.mark.parametrize(
    ("streams", "told"),
    [
        (">/dev/full", "standard output cannot be written: no space left on device"),
        ("1</dev/null", "standard output cannot be written: bad file descriptor"),
        (">&-", "standard output is closed"),
    ],
)
def test_standard_output_that_cannot_be_written_is_one_line(streams: str, told: str) -> None:
    done = shell(f"--version {streams}")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert line.startswith(f"statekv: {told} (")


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")
@pytest.mark.parametrize("streams", ["2>/dev/full", "2>&-", "<&-"])
def test_standard_error_is_missed_by_nobody(streams: str) -> None:
    done = shell(f"--version {streams}")
    assert (done.returncode, done.stdout) == (0, f"statekv {version('statekv')}\n")
    assert shell(f"ask no.mp4 what? {streams}").returncode == 1


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")
def test_a_failure_of_standard_output_is_told_once() -> None:
    with FULL.open("w", encoding="utf-8") as full:
        stream = console._guarded(full, told=True)
        stream.write("an answer")
        with pytest.raises(OutputError, match="no space left"):
            stream.flush()
        stream.write("another one")
        stream.close()


def test_a_file_that_cannot_be_written_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "film.mp4")

    monkeypatch.setattr("statekv.evals.cards.write_film", full)
    assert complaint(command("film", tmp_path / "film.mp4")) == "statekv: film.mp4: no space left on device"
