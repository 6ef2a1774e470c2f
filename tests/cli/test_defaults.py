"""Defaults of a user's own: what is typed wins over the environment, that over the file, that over the defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from statekv.cli.defaults import KNOWN
from statekv.config import SETTINGS
from statekv.evals.cards import write_film, write_story
from tests.cli.test_cli import COUNT, command, succeed
from tests.cli.test_errors import refused


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a film."""
    monkeypatch.chdir(tmp_path)
    write_film(write_story(7, 4.0), "film.mp4")
    return tmp_path


def asked(*options: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(succeed("ask", "film.mp4", COUNT, "--json", *options))
    return found


def test_the_nearest_wins(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked()["budget"] == SETTINGS["budget"].default
    (here / "statekv.toml").write_text("budget = 21\nfps = 2.0\nmax_new_tokens = 1\n")
    assert (asked()["budget"], asked()["frames"]) == (21, 8)
    monkeypatch.setenv("STATEKV_BUDGET", "22")
    assert (asked()["budget"], asked()["frames"]) == (22, 8)
    assert asked("--budget", "23")["budget"] == 23


def test_any_file_can_be_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "statekv.toml").write_text("budget = 21\n")
    (here / "other.toml").write_text('method = "random"\nbudget = 24\n')
    for line in (("--config", "other.toml"), ("--config=other.toml",)):
        found = asked(*line)
        assert (found["method"], found["budget"]) == ("random", 24)
    monkeypatch.setenv("STATEKV_CONFIG", "other.toml")
    assert asked()["method"] == "random"


@pytest.mark.parametrize("line", [("film.mp4", COUNT), ("--questions", "-")], ids=str)
def test_a_default_that_means_nothing_here_is_passed_over(here: Path, line: tuple[str, ...]) -> None:
    """What is typed must mean something; a default is for all commands and methods."""
    settings = 'retrieve = 3\nmax_lag_seconds = 9.0\nmemory = "8GiB"\nhost_memory = "1GiB"\nbudget = 64\n'
    (here / "statekv.toml").write_text(settings)
    assert (asked()["budget"], asked("--method", "full")["method"]) == (64, "full")
    assert asked("--method", "statekv_retrieve", "--budget", "65")["budget"] == 65
    assert "--retrieve is 3" in refused("ask", "film.mp4", COUNT, "--retrieve", "3")


def test_a_method_that_is_typed_is_not_undone_by_the_file(here: Path) -> None:
    (here / "statekv.toml").write_text('carry = "recent"\nmethod = "streaming_llm"\n')
    assert asked()["carry"] == "recent"
    assert asked("--method", "random")["method"] == "random"


def test_a_session_that_is_gone_on_with_stays_as_it_is(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    succeed("ask", "film.mp4", COUNT, "--budget", "30", "--save", "kept")
    (here / "statekv.toml").write_text('model = "nowhere"\nmethod = "random"\nbudget = 21\ndevice = "cpu"\n')
    found = json.loads(succeed("ask", "--restore", "kept", COUNT, "--json"))
    assert (found["model"], found["method"], found["budget"]) == ("demo", "statekv", 30)
    monkeypatch.setenv("STATEKV_DEVICE", "nowhere")
    assert "'nowhere'" in refused("ask", "--restore", "kept", COUNT)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("bugdet = 3", "statekv.toml has 'bugdet', which is no setting (known: budget"),
        ("budget = 0", "statekv.toml: budget is 0, but must be a whole number of at least 1"),
        ('budget = "many"', "statekv.toml: budget is 'many', but must be a whole number"),
        ('method = "best"', "statekv.toml: unknown method 'best'"),
        ("model = 3", "statekv.toml: model is 3, but must be a string"),
        ("trust_remote_code = true", "'trust_remote_code', which is no setting"),
        ("budget", "statekv.toml is no TOML: "),
        ("\udcff", "statekv.toml is no TOML: "),
    ],
)
def test_what_is_wrong_in_the_file_is_one_line(here: Path, text: str, told: str) -> None:
    (here / "statekv.toml").write_text(text, errors="surrogateescape")
    assert told in refused("ask", "film.mp4", COUNT)


def test_what_is_wrong_elsewhere(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no.toml cannot be read: no such file" in refused("ask", "film.mp4", COUNT, "--config", "no.toml")
    monkeypatch.setenv("STATEKV_BUDGET", "many")
    found = command("ask", "film.mp4", COUNT)
    assert (found.code, "--budget" in found.err) == (2, True)


def test_all_settings_are_known_and_which_model_where() -> None:
    assert [*SETTINGS, "method", "model", "dtype", "device", "device_map", "revision"] == KNOWN


def test_a_benchmarks_settings_stay_what_it_prescribes(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "statekv.toml").write_text('device = "nowhere"\n')
    monkeypatch.setenv("STATEKV_DECAY", "7")
    assert "'nowhere'" in refused("eval", "cards", "films", "--videos", "1", "--frames", "128")
