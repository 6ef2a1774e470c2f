"""`statekv eval`: a run, its table, its picture; the paper's table; going on, sharing work; bad input gets one line."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from PIL import Image

from statekv.config import Config
from statekv.evals import TASKS
from statekv.evals.results import ResultFile, read
from statekv.evals.tasks import cards as task
from tests.cli.test_cli import Result, command
from tests.cli.test_errors import complaint, interrupt, refused
from tests.evals.data_sets import videomme, write_lines, write_mlvu, write_videomme
from tests.evals.small import header, lines
from tests.tiny import tiny

METHODS = ("--method", "full,statekv", "--method", "uniform", "--budgets", "60,120")
NAMES = ("full", "statekv-120", "statekv-60", "uniform")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module", autouse=True)
def _short_films() -> Iterator[None]:
    """They allow the same questions as those of 128 frames."""
    with mock.patch.object(task, "_SHORTEST", 32):
        yield


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("films")


def cards(films: Path, out: Path, *line: str) -> Result:
    return command("eval", "cards", films, "--frames", "32", "--videos", "1", "--out", out, *line)


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
    assert [path.name for path in films.iterdir()] == ["cards-32-0.mp4"]
    for path in out.iterdir():
        results = read(path)
        assert (results.header.task, results.header.variant, results.header.model) == ("cards", "32 frames", "demo")
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
    assert "cards, 32 frames, demo" in found.out
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
    line = ("eval", "run", "cards", films, "--frames", "32", "--videos", "1", "--method", "uniform")
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
    (tmp_path / "cards-32-0.mp4").write_text("no video", encoding="utf-8")
    found = cards(tmp_path, tmp_path / "out", "--method", "full,uniform")
    failed, results = found.err.splitlines()
    assert found.code == 0
    assert failed.startswith("statekv: cards-32-0 failed with full, uniform: cards-32-0.mp4")
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
        (("mlvu", "--first", "20"), "first is 20, but the videos of mlvu have no numbers"),
        (("cards", "--first", "-1"), "first is -1"),
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


# The paper's table

BOTH = ("full", "statekv-9")


def paper(*line: str | Path) -> Result:
    return command("eval", "paper", *line, "--budget", "9")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A small MLVU and a small Video-MME."""
    folders = [tmp_path_factory.mktemp(name) for name in ("mlvu", "video-mme")]
    write_mlvu(folders[0])
    write_videomme(folders[1])
    return folders


@pytest.fixture(scope="module")
def reproduced(sets: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """Two of the methods on the first data set."""
    out = tmp_path_factory.mktemp("results") / "paper"
    return out, paper(sets[0], "--method", "full,statekv", "--out", out)


def test_what_it_takes_is_told_before_anything_is_run(sets: list[Path], tmp_path: Path) -> None:
    found = paper(*sets, "--out", tmp_path / "out", "--check")
    assert (found.code, found.err) == (0, "")
    told = [line.split()[0] for line in found.out.splitlines()]
    each = ["frames", "figure"]
    assert told == ["weights", "data", "data", *each, *each, "methods", "memory", "time", "to"]
    lines = dict(line.split(maxsplit=1) for line in found.out.splitlines())
    assert lines["methods"].startswith("full, recency_window-9 (the release's ")
    assert lines["methods"].endswith(", statekv-9, statekv_weighted-9")
    assert "2 of 2 of mlvu, 2 of 2 of videomme" in lines["time"]
    assert lines["to"] == f"go on  the same without --check; results go to {tmp_path / 'out'}"
    assert list(tmp_path.iterdir()) == []


def test_the_papers_table_is_run_and_shown(reproduced: tuple[Path, Result]) -> None:
    out, found = reproduced
    assert found.code == 0
    assert sorted(path.name for path in (out / "mlvu").iterdir()) == [f"{name}.0-of-1.jsonl" for name in BOTH]
    assert "mlvu, demo: 3 questions on 2 videos" in found.out
    assert "mean of task types" in found.out
    assert "mean of questions" in found.out
    assert "at most 1 frames/s and 512 frames; a question had seen 11.0 on average" in found.out


def test_run_again_only_its_table_is_shown(
    reproduced: tuple[Path, Result], sets: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("statekv.load", lambda *_, **__: pytest.fail("the model was loaded"))
    out, before = reproduced
    found = paper(sets[0], "--method", "full,statekv", "--out", out)
    assert (found.code, found.err) == (0, "")
    plan, table = found.out.split("time      none: all videos are done\n")
    assert plan.startswith("weights ")
    assert before.out.endswith(table)


def test_killed_it_goes_on_where_it_was(reproduced: tuple[Path, Result], sets: list[Path], tmp_path: Path) -> None:
    whole, before = reproduced
    shutil.copytree(whole, tmp_path / "out")
    full, killed = (tmp_path / "out" / "mlvu" / f"{name}.0-of-1.jsonl" for name in BOTH)
    data = killed.read_bytes()
    killed.write_bytes(data[: data.index(b'"video": "b.mp4"') + 40])  # in the middle of a line of the second video
    found = paper(sets[0], "--method", "full,statekv", "--out", tmp_path / "out")
    assert "videos that are not done yet, 1 of 2 of mlvu" in found.out
    assert read(killed).questions == read(whole / "mlvu" / killed.name).questions
    assert full.read_bytes() == (whole / "mlvu" / full.name).read_bytes()
    assert found.out.splitlines()[-8:] == before.out.splitlines()[-8:]


def test_missing_videos_stop_it_unless_that_is_wanted(tmp_path: Path) -> None:
    write_videomme(tmp_path)
    write_lines(tmp_path / "test.jsonl", [videomme(number, name) for number, name in enumerate("abc")])
    line = (tmp_path, "--method", "statekv", "--out", tmp_path / "out")
    found = paper(*line)
    assert found.code == 1
    assert "2 questions on 2 videos; 1 videos missing" in found.out
    assert found.err.startswith(f"statekv: videomme: {tmp_path / 'c.mp4'} is not there (get them")
    partly = paper(*line, "--partly")
    assert partly.code == 0
    assert f"{tmp_path / 'c.mp4'} is not there" in partly.err.splitlines()[0]
    assert list(read(tmp_path / "out" / "videomme" / "statekv-9.0-of-1.jsonl").videos) == ["a", "b"]


def test_the_papers_figures_stand_beside_those_of_its_models(tmp_path: Path) -> None:
    named: dict[str, Any] = {"task": "ovo_realtime", "variant": "", "model": "internvl3-1b", "max_frames": 512}
    ResultFile(tmp_path / "full.jsonl", header("full", **named)).append(lines("a", [True, False], letter=True))
    found = command("eval", "report", tmp_path).out
    assert "55.79" in found
    assert "paper: the mean of the sub-tasks stands beside the paper's" in found


def test_a_folder_of_weights_is_looked_at_first(sets: list[Path], tmp_path: Path) -> None:
    weights = tiny("qwen3_vl").save(tmp_path / "weights")
    line = (sets[0], "--model", weights, "--method", "statekv", "--out", tmp_path / "out")
    found = paper(*line, "--check")
    assert found.code == 0
    assert found.out.startswith("weights   qwen3_vl, none of the paper's models; 0.")
    assert "of 56 x 40 pixels, seen as " in found.out
    assert f"results go to {tmp_path / 'out'}" in found.out
    file = weights / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "model.safetensors is cut off" in complaint(paper(*line))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (
            ("--method", "full,random"),
            "unknown method 'random' (known: full, recency_window, statekv, statekv_weighted)",
        ),
        (("--model", "nowhere"), "nowhere is not a folder of weights"),
        (("--budget", "0"), "budget is 0, but must be"),
    ],
)
def test_a_table_that_cannot_be_run_is_one_line(line: tuple[str, ...], told: str, sets: list[Path]) -> None:
    found = command("eval", "paper", sets[0], *line)
    assert found.code
    assert told in " ".join(found.err.split())


def test_data_that_cannot_be_used_are_told_before_the_model_is_loaded(
    sets: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("statekv.load", lambda *_, **__: pytest.fail("the model was loaded first"))
    write_lines(tmp_path / "other" / "test.jsonl", [{"question": "What?"}])
    for folders, told in (
        ([tmp_path], "holds records of none of videomme, mlvu, ovo_realtime"),
        ([sets[1], tmp_path / "other"], "holds records of none of videomme, mlvu, ovo_realtime"),
        ([sets[0], sets[0]], "two of the folders hold the same data set"),
    ):
        found = paper(*folders)
        (line,) = found.err.splitlines()
        assert found.code == 1
        assert told in line


def test_results_need_room_before_the_model_is_loaded(sets: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("statekv.load", lambda *_, **__: pytest.fail("the model was loaded first"))
    monkeypatch.setattr("statekv.evals.paper.check.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    found = paper(sets[0])
    assert found.code == 1
    assert "are free (make room, or give another --out)" in found.err
