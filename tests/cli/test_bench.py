"""`statekv bench`: a table on stdout, rows in a CSV, a picture, one line that says where; bad input gets one line."""

from __future__ import annotations

import csv
import json
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
from PIL import Image

from statekv.bench.floor import Machine
from statekv.bench.harness import Row
from statekv.bench.models import SIZES
from statekv.evals.cards.render import write_film
from statekv.evals.cards.world import FIRST_TEST_SEED, write_story
from statekv.runner import memory
from tests.bench.small import FAMILIES
from tests.cache.test_folder import files_of_at_most
from tests.cli.test_cli import Result, command
from tests.cli.test_errors import complaint, interrupt, refused

ATTENTION = ("attention", "--models", "internvl3-1b", "--budgets", "64,16", "--queries", "8", "--runs", "2")
FLOPS = ("flops", "--models", "internvl3-1b,qwen3-vl-2b", "--budgets", "256", "--frames", "4,40")
MEMORY = ("memory", "--models", "internvl3-1b", "--budgets", "256", "--steps", "1,5")
EVERY_BENCH = pytest.mark.parametrize("line", [ATTENTION, FLOPS, MEMORY], ids=lambda line: line[0])
ON_CPU = ("--device", "cpu")


def bench(*line: str | Path) -> Result:
    """A picture is drawn where it is asked for: that takes longer than most of what it shows."""
    drawn = nullcontext() if "--picture" in line else mock.patch("statekv.bench.harness.draw")
    with drawn:
        return command("bench", *line, *(() if line[0] == "flops" else ON_CPU))


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@EVERY_BENCH
def test_a_bench_leaves_a_table_rows_and_a_picture(line: tuple[str, ...], tmp_path: Path) -> None:
    rows, picture = tmp_path / "deep" / "rows.csv", tmp_path / "picture.png"
    found = bench(*line, "--csv", rows, "--picture", picture)
    assert found.code == 0
    assert found.err.splitlines() == [f"rows: {rows}    picture: {picture}"]
    written = rows_of(rows)
    assert {row["bench"] for row in written} == {line[0]}
    assert all(row["p20"] and row["p50"] and row["p80"] and row["floor"] for row in written if not row["remark"])
    assert all(row["command"].startswith(f"statekv bench {line[0]} --models") for row in written)
    for subject in {row["subject"] for row in written}:
        assert any(shown.startswith(subject) for shown in found.out.splitlines())
    assert "× floor" in found.out
    with Image.open(picture) as image:
        assert image.format == "PNG"


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch need not count: `flops` alone does not look at what it found."""
    monkeypatch.setattr("statekv.bench.floor.check", lambda *_, **__: Row("flops", "unchecked", {}, "TFLOP", (1.0,)))


def test_rows_as_json_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    shown = [json.loads(line) for line in bench(*FLOPS, "--csv", path, "--json").out.splitlines()]
    written = rows_of(path)
    assert [{name: row[name] for name in ("subject", "unit", "command")} for row in written] == [
        {name: row[name] for name in ("subject", "unit", "command")} for row in shown
    ]
    assert [json.loads(row["setting"]) for row in written] == [row["setting"] for row in shown]
    assert [float(row["p50"]) if row["p50"] else None for row in written] == [row["p50"] for row in shown]
    assert list(written[0]) == list(shown[0])


@pytest.mark.usefixtures("unchecked")
def test_where_there_is_no_room_no_row_is_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    bench(*FLOPS, "--csv", path)
    before = path.read_bytes()
    with files_of_at_most(len(before) + 100):
        found = bench(*FLOPS, "--csv", path)
    assert (found.code, len(found.err.splitlines())) == (1, 1)
    assert f"{path} cannot be written" in found.err
    assert path.read_bytes() == before


@pytest.mark.usefixtures("unchecked")
def test_rows_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    bench(*FLOPS, "--csv", path)
    once = rows_of(path)
    bench(*FLOPS, "--csv", path)
    assert rows_of(path) == once * 2


@pytest.mark.usefixtures("unchecked")
def test_where_rows_go_unless_told_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "rows: statekv-bench/flops.csv" in bench(*FLOPS).err
    Path("benchmarks", "results").mkdir(parents=True)
    assert "rows: benchmarks/results/flops.csv" in bench(*FLOPS).err
    assert Path("benchmarks", "results", "flops.csv").exists()


def test_attention_compares_with_stock(tmp_path: Path) -> None:
    found = bench(*ATTENTION, "--csv", tmp_path / "rows.csv")
    written = rows_of(tmp_path / "rows.csv")
    assert [row["ratio"] for row in written if row["subject"] == "sdpa"] == ["1", "1"]
    assert all(row["ratio"] and row["runs"] == "2" for row in written if row["subject"] in ("naive", "blocked"))
    assert "× stock" in found.out
    assert "GFLOP/s" in found.out


def test_flops_agree_with_torchs_count(tmp_path: Path) -> None:
    bench(*FLOPS, "--csv", tmp_path / "rows.csv")
    checks = [row for row in rows_of(tmp_path / "rows.csv") if row["subject"].startswith("check")]
    assert [row["distance"] for row in checks] == ["1"] * 4


@pytest.mark.usefixtures("unchecked")
def test_all_models_are_in_the_table_unless_some_are_named(tmp_path: Path) -> None:
    found = bench("flops", "--budgets", "256", "--frames", "64", "--csv", tmp_path / "rows.csv")
    assert all(f" {name} " in found.out for name in SIZES)


def test_a_peer_is_run_beside_the_others(tmp_path: Path) -> None:
    peer = tmp_path / "peer.py"
    peer.write_text(
        "import torch\n"
        "from statekv.ops.reference import attention_with_key_scores\n"
        "def flash_attn_with_key_scores(q, k, v, sm_scale=None, causal=True, cache_len=0):\n"
        "    assert causal and cache_len == k.shape[2] - q.shape[2]\n"
        "    return attention_with_key_scores(q, k, v, scale=sm_scale)\n"
    )
    bench(*ATTENTION, "--peer", peer, "--csv", tmp_path / "rows.csv")
    assert [row["runs"] for row in rows_of(tmp_path / "rows.csv") if row["subject"] == "peer"] == ["2", "2"]


# What goes wrong


def test_a_peer_without_the_function(tmp_path: Path) -> None:
    (tmp_path / "peer.py").write_text("x = 1\n")
    line = refused("bench", *ATTENTION, "--peer", tmp_path / "peer.py", "--csv", tmp_path / "rows.csv")
    assert f"{tmp_path / 'peer.py'} has no function flash_attn_with_key_scores" in line
    assert not (tmp_path / "rows.csv").exists()


def test_a_peer_that_is_not_there(tmp_path: Path) -> None:
    assert "no.py is not a file" in refused("bench", *ATTENTION, "--peer", tmp_path / "no.py")


@pytest.mark.parametrize("line", [("flops",), ("attention",), ("memory",)])
def test_a_model_that_nobody_knows(line: tuple[str, ...]) -> None:
    complaint_of = refused("bench", *line, "--models", "internvl3-1b,gpt")
    assert "unknown model 'gpt'" in complaint_of
    assert all(name in complaint_of for name in SIZES)


@pytest.mark.parametrize("text", ["0", "-1", "many", "1,,2", "", "1.5", "9" * 8, "²"])
def test_numbers_that_are_none(text: str) -> None:
    assert f"budgets is {text!r}" in refused("bench", "flops", "--budgets", text)
    assert f"steps is {text!r}" in refused("bench", "memory", "--steps", text)
    assert f"frames is {text!r}" in refused("bench", "flops", "--frames", text)


@pytest.mark.parametrize("wrong", [("--device", "nope"), ("--dtype", "int8")])
def test_a_place_or_type_that_does_not_exist(wrong: tuple[str, str]) -> None:
    assert wrong[1] in refused("bench", *ATTENTION, *wrong)
    assert wrong[1] in refused("bench", *MEMORY, *wrong)


def test_a_budget_that_does_not_fit(tmp_path: Path) -> None:
    line = refused("bench", "memory", *MEMORY[1:3], "--budgets", "9999999", "--csv", tmp_path / "r.csv", *ON_CPU)
    assert "a budget of 9999999 tokens" in line


@EVERY_BENCH
def test_places_that_cannot_be_written_to(line: tuple[str, ...], tmp_path: Path) -> None:
    assert "is a folder" in refused("bench", *line, "--csv", tmp_path)
    assert "is a folder" in refused("bench", *line, "--csv", tmp_path / "rows.csv", "--picture", tmp_path)
    if Path("/proc/self").exists():
        assert "/proc/nowhere" in refused("bench", *line, "--csv", "/proc/nowhere/rows.csv")
    (tmp_path / "prices.csv").write_text("fruit,price\n")
    assert "prices.csv does not begin with" in refused("bench", *line, "--csv", tmp_path / "prices.csv")


def test_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("statekv.bench.floor.measure", interrupt)
    complaint(command("bench", *FLOPS, "--csv", tmp_path / "rows.csv"), 130)


@pytest.mark.parametrize("arguments", [("bench",), ("bench", "attention"), ("bench", "flops"), ("bench", "memory")])
def test_help(arguments: tuple[str, ...]) -> None:
    found = command(*arguments, "--help")
    assert (found.code, found.err) == (0, "")
    assert found.out.lstrip().startswith("Usage: statekv bench")


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
    monkeypatch.setattr("statekv.bench.harness._WIDTH", 64)  # of a product whose speed nobody looks at


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    write_film(write_story(FIRST_TEST_SEED, 12), path)
    return path


@pytest.mark.parametrize("line", [PREFILL, ANSWER, SESSIONS, ("video", "--runs", "2")], ids=lambda line: line[0])
def test_a_bench_leaves_a_table_rows_and_a_picture_bench_streams(
    line: tuple[str, ...], film: Path, tmp_path: Path
) -> None:
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

    monkeypatch.setattr("statekv.bench.models.check_fits", check)
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
def test_help_bench_streams(name: str) -> None:
    found = command("bench", name, "--help")
    assert (found.code, found.err) == (0, "")
    assert found.out.lstrip().startswith(f"Usage: statekv bench {name}")
