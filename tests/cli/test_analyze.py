"""`statekv analyze`: files in a folder, a table or JSON on stdout, one line for whatever is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from statekv.evals.cards.render import write_film
from statekv.evals.cards.world import FIRST_TEST_SEED, write_story
from tests.cli.test_cli import command
from tests.cli.test_errors import refused
from tests.models.families.test_text import checkpoint
from tests.tiny import tiny

FILES = [
    *("concentration.csv", "layers.csv", "held.csv"),
    *("concentration.png", "recall.png", "churn.png", "held-map.png", "held-strip.png", "held.webp"),
]


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    write_film(write_story(FIRST_TEST_SEED, 12), path)
    return path


def test_tables_and_pictures_are_written_and_the_means_are_shown(film: Path, tmp_path: Path) -> None:
    found = command("analyze", film, "--budget", "30", "--out", tmp_path / "new" / "found")
    assert found.code == 0
    assert sorted(path.name for path in (tmp_path / "new" / "found").iterdir()) == sorted(FILES)
    assert found.err == f"in {tmp_path / 'new' / 'found'}: {', '.join(FILES)}\n"
    assert "weighted recall" in found.out
    assert "carried cache of 30 captured" in found.out
    (row,) = [line for line in found.out.splitlines() if "16384" in line]
    assert row.split("│")[2:6] == ["    100.0 ", "           100.0 ", "     100.0 ", "   0.0 "]


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_json_of_a_checkpoint_in_a_folder(family: str, film: Path, tmp_path: Path) -> None:
    model = tiny(family).save(tmp_path / family)
    line = ("--model", model, "--layers", "0,2", "--max-frames", "6", "--budget", "20", "--json")
    found = command("analyze", film, *line, "--out", tmp_path / "out")
    assert found.code == 0
    told = json.loads(found.out)
    assert (told["model"], told["frames"], told["steps"], told["layers"]) == (family, 6, 3, [0, 2])
    assert [Path(file).name for file in told["files"]] == FILES
    assert 0 < told["captured_by_carried"] <= told["captured_by_best"] < 1


def test_a_budget_above_the_stream_is_fine_and_said(
    film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("statekv.analysis.plots.draw_curves", lambda *_: [])
    found = command("analyze", film, "--out", tmp_path)
    assert found.code == 0
    told, _ = found.err.splitlines()
    assert "budget 4096 holds all" in told
    assert "--budget 11" in told


def test_what_is_wrong_is_one_line(film: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    assert "does not exist" in refused("analyze", tmp_path / "none.mp4", *out)
    assert "budget is 0" in refused("analyze", film, "--budget", "0", *out)
    assert "--max-frames is 0" in refused("analyze", film, "--max-frames", "0", *out)
    assert "must be at least 3" in refused("analyze", film, "--max-frames", "2", *out)
    assert "layers is '1,x'" in refused("analyze", film, "--layers", "1,x", *out)
    assert "layer 7 is not there, the model has 0 to 4" in refused("analyze", film, "--layers", "7", *out)
    assert "cannot be a folder" in refused("analyze", film, "--out", film)
    assert not list((tmp_path / "out").iterdir())


def test_a_text_has_the_curves_without_the_frames(tmp_path: Path) -> None:
    model, text, out = checkpoint(tmp_path / "model"), tmp_path / "text", ("--out", tmp_path / "out")
    text.write_text("a b c d " * 100, encoding="utf-8")
    line = ("--text", text, "--model", model, "--budget", "20")
    found = command("analyze", *line, "--tokens", "96", "--step", "16", *out)
    assert found.code == 0, found.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*FILES[:2], *FILES[3:6]])
    assert "6 steps, 96 tokens" in found.out
    assert "carried cache of 20 captured" in found.out
    assert "tokens, but tokens is 9999" in refused("analyze", *line, "--tokens", "9999", *out)
    assert "one of them is needed" in refused("analyze", "film.mp4", *line, *out)
    assert "one of them is needed" in refused("analyze", *out)
    assert "--fps is of videos" in refused("analyze", *line, "--fps", "2", *out)
    assert "--revision is of videos" in refused("analyze", *line, "--revision", "main", *out)
    assert "cannot be read as text" in refused("analyze", "--text", tmp_path / "none", "--model", model, *out)
