"""The examples run as they stand."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# What the output of some must hold: those are true whatever the machine does.
SAID = {
    "ask_film": ["after 26 frames", "after 46 frames", "after 60 frames"],
    "fixed_memory": ["half way:", "the end:", "steps forgotten of 120"],
    "live_camera": ["19 s:", "39 s:", "59 s:"],
    "many_streams": ["half a minute in:", "7.mp4", "10.mp4"],
}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
def test_it_runs(example: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(example)])
    monkeypatch.syspath_prepend(example.parent)
    runpy.run_path(str(example), run_name="__main__")
    said = capsys.readouterr().out
    assert said
    for part in SAID.get(example.stem, []):
        assert part in said


def test_the_drop_in_equals_the_stock_model(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "drop_in.py"), run_name="__main__")
    stock, unlimited, few = [line.partition(":")[2].strip() for line in capsys.readouterr().out.splitlines()]
    assert stock == unlimited != few
