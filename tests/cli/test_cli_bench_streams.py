"""`statekv bench prefill | answer | sessions | video`, on models that build in no time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from statekv.bench.floor import Machine
from statekv.bench.sizes import SIZES
from statekv.evals.cards.film import write_film
from statekv.evals.cards.world import FIRST_TEST_SEED, write_story
from statekv.runner import memory
from tests.bench.small import FAMILIES
from tests.cli.test_cli import command
from tests.cli.test_cli_bench import bench, rows_of
from tests.cli.test_cli_errors import refused

NAMES = [size.name for size in FAMILIES]
MODELS = ("--models", ",".join(NAMES))
PREFILL = ("prefill", *MODELS, "--budgets", "8", "--steps", "1,5", "--tokens", "6", "--runs", "2")
WAYS = ("in turn", "together", "together anew")
SESSIONS = ("sessions", *MODELS, "--sessions", "1,3", "--budget", "16", "--tokens", "6", "--runs", "2")
ANSWER = ("answer", *MODELS, "--steps", "1,5", "--tokens", "6", "--question", "3", "--answer", "4", "--runs", "2")


@pytest.fixture(autouse=True)
def _small_models_on_a_known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in FAMILIES:
        monkeypatch.setitem(SIZES, size.name, size)  # type: ignore[arg-type]
    monkeypatch.setattr("statekv.bench.floor.Machine.measured", lambda *_: Machine(flops=2e9, read=1e9))


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    write_film(write_story(FIRST_TEST_SEED, 12), path)
    return path


@pytest.mark.parametrize("line", [PREFILL, ANSWER, SESSIONS, ("video", "--runs", "2")], ids=lambda line: line[0])
def test_a_bench_leaves_a_table_rows_and_a_picture(line: tuple[str, ...], film: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows, picture = tmp_path / "rows.csv", tmp_path / "picture.png"
    file = (film,) if line[0] == "video" else ()
    found = bench(*line, *file, "--csv", rows, "--picture", picture)
    assert (found.code, found.err) == (0, f"rows: {rows}    picture: {picture}\n")
    written = rows_of(rows)
    assert {row["bench"] for row in written} == {line[0]}
    assert {row["runs"] for row in written} == {"2"}
    assert "× floor" in found.out
    assert ("products at 2 GFLOP/s" in found.out) == (line[0] == "answer")
    assert ("large product" in found.out) == (line[0] in ("prefill", "sessions"))
    with Image.open(picture) as image:
        assert image.format == "PNG"


def test_prefill_measures_every_model_method_and_step(tmp_path: Path) -> None:
    bench(*PREFILL, "--csv", tmp_path / "rows.csv")
    found = [(row["subject"], json.loads(row["setting"])) for row in rows_of(tmp_path / "rows.csv")]
    measured = [(setting["model"], setting["step"], subject) for subject, setting in found if "step" in setting]
    assert measured == [(name, step, method) for name in NAMES for step in (1, 5) for method in ("full", "statekv")]


def test_sessions_measures_both_ways_on_every_model(tmp_path: Path) -> None:
    bench(*SESSIONS, "--csv", tmp_path / "rows.csv")
    found = [(row["subject"], json.loads(row["setting"])) for row in rows_of(tmp_path / "rows.csv")]
    measured = [(setting["model"], setting["sessions"], way) for way, setting in found if "sessions" in setting]
    assert measured == [(name, *row) for name in NAMES for row in [(1, "in turn"), *((3, way) for way in WAYS)]]


def test_sessions_of_the_demo_model(tmp_path: Path) -> None:
    line = ("sessions", "--sessions", "2", "--budget", "30", "--runs", "1", "--csv", tmp_path / "rows.csv")
    assert bench(*line).code == 0
    found = [json.loads(row["setting"]) for row in rows_of(tmp_path / "rows.csv")]
    assert {(setting["model"], setting["tokens"]) for setting in found} == {("demo", 9)}


@pytest.mark.parametrize("line", [PREFILL, ANSWER, SESSIONS], ids=lambda line: line[0])
def test_layers_left_out_are_in_every_row(line: tuple[str, ...], tmp_path: Path) -> None:
    bench(*line, "--layers", "2", "--csv", tmp_path / "rows.csv")
    assert {json.loads(row["setting"])["layers"] for row in rows_of(tmp_path / "rows.csv")} == {2}


def test_video_says_where_the_time_goes(film: Path, tmp_path: Path) -> None:
    found = bench("video", film, "--runs", "1", "--max-frames", "9", "--csv", tmp_path / "rows.csv")
    for word in ("sequential", "overlapped", "decode", "vision", "prefill", "waiting", "video s/s", "frames 9"):
        assert word in found.out


# What goes wrong


def test_a_model_that_does_not_fit_is_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = memory.check_fits

    def check(what: str, needed: int, *rest: object) -> None:
        real(what, needed << 40 if NAMES[0] in what else needed, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("statekv.bench.build.check_fits", check)
    found = bench(*PREFILL, "--csv", tmp_path / "rows.csv")
    first, _ = found.err.splitlines()
    assert first.startswith(f"statekv: left out: {NAMES[0]} with 3 layers would take")
    assert {json.loads(row["setting"])["model"] for row in rows_of(tmp_path / "rows.csv")} == {NAMES[1]}


@pytest.mark.parametrize("line", [PREFILL, ANSWER, SESSIONS], ids=lambda line: line[0])
def test_where_no_model_fits_there_is_one_line(
    line: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda _: 1000)
    told = refused("bench", *line, "--device", "cpu", "--csv", tmp_path / "rows.csv")
    assert "would take 0.0 GiB, but cpu has 0.0 GiB free (try fewer layers or a half dtype)" in told
    assert not (tmp_path / "rows.csv").exists()


@pytest.mark.parametrize("line", [PREFILL, ANSWER], ids=lambda line: line[0])
@pytest.mark.parametrize("wrong", [("--models", "gpt"), ("--layers", "99"), ("--steps", "0"), ("--dtype", "int8")])
def test_bad_settings(line: tuple[str, ...], wrong: tuple[str, str]) -> None:
    assert wrong[1] in refused("bench", *line, *wrong)


def test_a_video_that_is_none(tmp_path: Path) -> None:
    assert "no.mp4 does not exist" in refused("bench", "video", tmp_path / "no.mp4")
    (tmp_path / "text.mp4").write_text("not a video")
    assert "text.mp4" in refused("bench", "video", tmp_path / "text.mp4", "--csv", tmp_path / "rows.csv")


@pytest.mark.parametrize("wrong", [("--models", "demo,gpt"), ("--layers", "99"), ("--sessions", "0")])
def test_bad_settings_of_sessions(wrong: tuple[str, str]) -> None:
    assert wrong[1].removeprefix("demo,") in refused("bench", *SESSIONS, *wrong)


@pytest.mark.parametrize("name", ["prefill", "answer", "sessions", "video"])
def test_help(name: str) -> None:
    found = command("bench", name, "--help")
    assert (found.code, found.err) == (0, "")
    assert found.out.lstrip().startswith(f"Usage: statekv bench {name}")
