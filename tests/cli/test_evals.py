"""`statekv eval`: a run, its table, its picture; going on, sharing the work; bad input gets one line."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from statekv.config import Config
from statekv.evals import TASKS
from statekv.evals.results import ResultFile, read
from tests.cli.test_cli import Result, command
from tests.cli.test_errors import complaint, interrupt, refused
from tests.evals.small import header, lines

METHODS = ("--method", "full,statekv", "--method", "uniform", "--budgets", "60,120")
NAMES = ("full", "statekv-120", "statekv-60", "uniform")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("films")


def cards(films: Path, out: Path, *line: str) -> Result:
    return command("eval", "cards", films, "--frames", "128", "--videos", "1", "--out", out, *line)


@pytest.fixture(scope="module")
def ran(films: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """One film with full attention, two budgets and sixteen frames."""
    out = tmp_path_factory.mktemp("results") / "here"
    return out, cards(films, out, *METHODS)


def test_a_run_leaves_a_file_for_each_configuration(ran: tuple[Path, Result], films: Path) -> None:
    out, found = ran
    assert (found.code, found.out) == (0, "")
    assert found.err.splitlines() == [f"results: {out}    table: statekv eval report {out}"]
    assert [path.name for path in sorted(out.iterdir())] == [f"{name}.0-of-1.jsonl" for name in NAMES]
    assert [path.name for path in films.iterdir()] == ["cards-128-0.mp4"]
    for path in out.iterdir():
        results = read(path)
        assert (results.header.task, results.header.variant, results.header.model) == ("cards", "128 frames", "demo")
        assert len(results.questions) > 10
        assert {"kl", "agrees", "score"} <= results.questions[0].keys()
    assert read(out / "statekv-60.0-of-1.jsonl").header.config["budget"] == 60


def test_run_again_it_has_nothing_to_do(ran: tuple[Path, Result], films: Path) -> None:
    out, _ = ran
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert cards(films, out, *METHODS).code == 0
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_the_table(ran: tuple[Path, Result]) -> None:
    found = command("eval", "report", ran[0])
    assert (found.code, found.err) == (0, "")
    assert "cards, 128 frames, demo" in found.out
    assert max(map(len, found.out.splitlines())) <= 120
    rows = [line.split() for line in found.out.splitlines()]
    assert [row[:2] for row in rows if row and row[0] == "statekv"] == [["statekv", "60"], ["statekv", "120"]] * 2
    accuracy = read(ran[0] / "full.0-of-1.jsonl").questions
    share = 100 * sum(row["score"] for row in accuracy) / len(accuracy)
    assert next(row for row in rows if row and row[0] == "full")[1] == f"{share:.1f}"


def test_the_table_as_data(ran: tuple[Path, Result]) -> None:
    runs = [json.loads(line) for line in command("eval", "report", ran[0], "--json").out.splitlines()]
    rows = list(csv.DictReader(io.StringIO(command("eval", "report", ran[0], "--csv").out)))
    assert (
        [run["method"] for run in runs] == [row["method"] for row in rows] == ["full", "statekv", "statekv", "uniform"]
    )
    for run, row in zip(runs, rows, strict=True):
        assert run["headlines"]["accuracy"] == float(row["accuracy"])
        assert run["low"] is None  # one video tells no interval
        assert row["low"] == ""


def test_the_picture(ran: tuple[Path, Result], tmp_path: Path) -> None:
    found = command("eval", "picture", ran[0], "--file", tmp_path / "new" / "cost.png")
    assert (found.code, found.out) == (0, "")
    assert found.err.splitlines() == [f"picture: {tmp_path / 'new' / 'cost.png'}"]
    with Image.open(tmp_path / "new" / "cost.png") as image:
        assert image.format == "PNG"


def test_shares_of_the_work(films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = cards(films, tmp_path / "given", "--shard", "1/2", "--method", "uniform")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    launched = cards(films, tmp_path / "launched", "--method", "uniform")
    assert given.code == launched.code == 0
    for folder in ("given", "launched"):
        found = read(tmp_path / folder / "uniform.1-of-2.jsonl")
        assert (found.header.shard, found.questions) == ("1/2", [])  # the only film is the other's


def test_methods_with_settings_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Config] = {}
    monkeypatch.setattr("statekv.evals.runner.evaluate", lambda engine, task, configs, *_, **__: seen.update(configs))
    line = "full:max_frames=16, statekv:decay=0.5:pin_prefix=true,uniform:on_horizon=error"
    given = ("--budgets", "60,70", "--max-frames", "32", "--horizon", "900", "--on-horizon", "compact")
    assert cards(tmp_path, tmp_path, "--method", line, *given).code == 0
    assert list(seen) == [
        "full-max_frames=16",
        *(f"statekv-decay=0.5-pin_prefix=true-{n}" for n in (60, 70)),
        "uniform-on_horizon=error",
    ]
    chosen = seen["statekv-decay=0.5-pin_prefix=true-70"]
    assert (chosen.budget, chosen.decay, chosen.pin_prefix, chosen.max_frames) == (70, 0.5, True, 32)
    assert (chosen.fps, chosen.max_new_tokens) == (1.0, 8)
    assert (seen["full-max_frames=16"].max_frames, seen["uniform-on_horizon=error"].max_frames) == (16, 32)
    assert [config.on_horizon for config in seen.values()] == ["compact", "compact", "compact", "error"]
    assert {config.horizon for config in seen.values()} == {900}


def test_where_results_go_unless_told_otherwise(films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = ("eval", "run", "cards", films, "--frames", "128", "--videos", "1", "--method", "uniform")
    assert "results: statekv-eval/cards/demo " in command(*line).err
    assert Path("statekv-eval", "cards", "demo", "uniform.0-of-1.jsonl").exists()


def test_what_a_reader_must_know_is_told_once(tmp_path: Path) -> None:
    for name in ("full", "random"):
        file = ResultFile(tmp_path / f"{name}.jsonl", header(name, shard="0/2"))
        file.append(lines("a", [True]))
        file.append([{"type": "failed", "video": "b", "reason": "is not there"}])
    found = command("eval", "report", tmp_path)
    assert found.err.splitlines() == ["statekv: b failed: is not there", "statekv: shard 1/2 is missing"]


def test_videos_that_fail_are_told(tmp_path: Path) -> None:
    (tmp_path / "cards-128-0.mp4").write_text("no video", encoding="utf-8")
    found = cards(tmp_path, tmp_path / "out", "--method", "full,uniform")
    failed, results = found.err.splitlines()
    assert found.code == 0
    assert failed.startswith("statekv: cards-128-0 failed with full, uniform: cards-128-0.mp4")
    assert "; videos that failed: 1" in results


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (("nonsense",), "unknown task 'nonsense' (known: cards, "),
        (("cards", "--method", "full,nonsense"), "unknown method 'nonsense' (known: "),
        (("cards", "--method", "statekv:decay"), "'decay' in statekv:decay is no setting"),
        (("cards", "--method", "statekv:budget=7"), "'budget=7' in statekv:budget=7 is no setting"),
        (("cards", "--method", "statekv:other=7"), "unknown setting 'other'"),
        (("cards", "--budgets", "0"), "budgets is '0'"),
        (("cards", "--frames", "5"), "frames is 5"),
        (("cards", "--shard", "2/2"), "shard is 2/2"),
        (("cards", "--shard", "half"), "shard is 'half'"),
        (("cards", "--retrieve", "9"), "--retrieve is 9 with recall 'all'"),
        (("cards", "--method", "full,uniform", "--kernel", "naive"), "--kernel is 'naive' with carry 'all'"),
        (("cards", "--method", "full:budget_slope=1"), "unknown setting 'budget_slope'"),
        (("cards", "--layout", "other"), "unknown --layout 'other'"),
        (("cards", "--on-horizon", "hope"), "unknown --on-horizon 'hope'"),
        (("mlvu", "--frames", "200"), "frames is 200"),
        (("report", "nowhere"), "there are no results at nowhere"),
        (("report", "nowhere", "--json", "--csv"), "--json and --csv"),
        (("picture", "nowhere"), "there are no results at nowhere"),
    ],
)
def test_bad_input_is_one_line(
    line: tuple[str, ...], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("statekv.load", lambda *_, **__: pytest.fail("the model was loaded first"))
    assert told in refused("eval", *line)


@pytest.mark.parametrize("task", [task for task in TASKS if task != "cards"])
def test_data_that_are_not_there_are_one_line(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("statekv.load", lambda *_, **__: pytest.fail("the model was loaded first"))
    refused("eval", task, tmp_path / "nowhere")


def test_results_of_another_run_are_one_line(ran: tuple[Path, Result], films: Path) -> None:
    told = complaint(cards(films, ran[0], *METHODS, "--layout", "release"))
    assert "config layout 'release' instead of 'hf'" in told
    assert "--out" in told


def test_results_that_cannot_be_read_are_one_line(films: Path, tmp_path: Path) -> None:
    (tmp_path / "full.0-of-1.jsonl").write_text("rubbish\n", encoding="utf-8")
    assert "line 1" in complaint(cards(films, tmp_path, "--method", "full"))
    assert "line 1" in refused("eval", "report", tmp_path)


def test_an_interrupted_run_can_be_gone_on_with(films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("statekv.engine.session.Session.ask", interrupt)
        line = complaint(cards(films, tmp_path, "--method", "uniform"), code=130)
        assert line.startswith("statekv: interrupted; ")
        assert line.endswith("the same command goes on from there")
    assert cards(films, tmp_path, "--method", "uniform").code == 0
    assert len(read(tmp_path / "uniform.0-of-1.jsonl").videos) == 1
