"""A row's figures, and the file that they are added to."""

from __future__ import annotations

import csv
import datetime
import json
import math
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

from statekv.bench.harness import (
    Bars,
    Circumstances,
    Panel,
    Row,
    alternate,
    alternate_within,
    append,
    check_columns,
    device_name,
    draw,
    is_due,
    matmul_rate,
    place,
    turns_within,
    wait,
)
from statekv.errors import ConfigError, OutputError
from tests.cache.test_folder import files_of_at_most

ROW = Row("attention", "blocked", {"model": "a, b", "budget": 256}, "ms", (4.0, 1.0, 2.0, 3.0, 5.0), 1.5, 2.0)
LEFT_OUT = Row("attention", "naive", {"budget": 16384}, "ms", (), 1.5, 2.0, "left out: too large")
HERE = Circumstances("statekv bench attention", "a processor", 2, "python 3.11", "abc1234", "2026-11-21")


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_quantiles_are_interpolated() -> None:
    assert [ROW.quantile(share) for share in (0, 0.2, 0.5, 1)] == pytest.approx([1, 1.8, 3, 5])
    assert ROW.median == 3


def test_distance_and_ratio_are_of_the_median() -> None:
    assert (ROW.distance, ROW.ratio) == (2, 1.5)


def test_without_samples_there_is_nothing_to_say() -> None:
    assert math.isnan(LEFT_OUT.median)
    assert (LEFT_OUT.distance, LEFT_OUT.ratio) == (None, None)


@pytest.mark.parametrize("floor", [None, 0.0])
def test_without_a_floor_there_is_no_distance(floor: float | None) -> None:
    assert Row("b", "s", {}, "ms", (1.0,), floor).distance is None


def test_a_file_grows_under_one_header(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.csv"
    append(path, [ROW], HERE)
    append(path, [LEFT_OUT, ROW], HERE)
    found = read(path)
    assert [row["subject"] for row in found] == ["blocked", "naive", "blocked"]
    assert found[0] == found[2]
    assert json.loads(found[0]["setting"]) == ROW.setting
    assert [found[0][name] for name in ("p20", "p50", "p80", "runs")] == ["1.8", "3", "4.2", "5"]
    assert [found[0][name] for name in ("floor", "distance", "ratio")] == ["1.5", "2", "1.5"]
    assert [found[0][name] for name in ("device", "threads", "commit")] == ["a processor", "2", "abc1234"]
    assert [found[1][name] for name in ("p50", "runs", "distance", "ratio")] == ["", "0", "", ""]
    assert found[1]["remark"] == "left out: too large"


def test_an_empty_file_gets_a_header(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").touch()
    append(tmp_path / "rows.csv", [ROW], HERE)
    assert len(read(tmp_path / "rows.csv")) == 1


def test_somebody_elses_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "prices.csv"
    path.write_text("fruit,price\napple,3\n")
    for use in (lambda: append(path, [ROW], HERE), lambda: check_columns(path)):
        with pytest.raises(ConfigError, match=r"prices\.csv does not begin"):
            use()
    assert path.read_text() == "fruit,price\napple,3\n"


def test_rows_that_find_no_room_are_told(tmp_path: Path) -> None:
    with files_of_at_most(8), pytest.raises(OutputError, match=r"rows\.csv cannot be written"):
        append(tmp_path / "rows.csv", [ROW], HERE)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no /dev/zero")
def test_a_file_without_end_is_not_read_to_its_end() -> None:
    with pytest.raises(ConfigError, match="does not begin with the columns"):
        check_columns(Path("/dev/zero"))


def test_names_of_files_need_not_be_utf_8(tmp_path: Path) -> None:
    here = Circumstances.here("statekv bench x --csv \udcff.csv", torch.device("cpu"))
    append(tmp_path / "rows.csv", [], here)
    assert here.command == "statekv bench x --csv \\udcff.csv"


def test_circumstances_of_this_machine() -> None:
    here = Circumstances.here("statekv bench x", torch.device("cpu"))
    assert here.command == "statekv bench x"
    assert here.device == device_name(torch.device("cpu")) != ""
    assert here.threads == torch.get_num_threads()
    assert f"torch {torch.__version__}" in here.versions
    assert datetime.date.fromisoformat(here.date).year >= 2026


CPU = torch.device("cpu")


def test_candidates_take_turns() -> None:
    called: list[str] = []
    found = alternate({name: partial(called.append, name) for name in "abc"}, runs=3, device=CPU, warm=2)
    assert called == [*"aabbcc", *"abcabcabc"]
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 3, "b": 3, "c": 3}
    assert all(second >= 0 for seconds in found.values() for second in seconds)


def test_nothing_to_time() -> None:
    assert alternate({}, runs=5, device=CPU) == {}


def test_a_candidate_that_fails_says_so() -> None:
    with pytest.raises(ZeroDivisionError):
        alternate({"fails": lambda: 1 // 0}, runs=1, device=CPU)


def test_a_gpu_is_waited_for_and_a_cpu_is_never_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    for device in (CPU, torch.device("cuda", 0)):
        wait(device)
    assert waited == [torch.device("cuda", 0)]


def test_the_rate_is_a_number_of_flops() -> None:
    rate = matmul_rate(CPU, torch.float32, rows=1, runs=1)
    assert math.isfinite(rate)
    assert rate > 0


def test_everybody_quick_has_every_turn_and_all_alternate() -> None:
    calls: list[str] = []
    candidates = {name: lambda name=name: calls.append(name) for name in "ab"}
    found = alternate_within(candidates, runs=3, seconds=60, device=CPU)
    assert calls == list("ab") * 5  # two rounds go first, untimed
    assert {name: len(timed) for name, timed in found.items()} == {"a": 3, "b": 3}


def test_who_is_too_slow_for_the_limit_has_one_turn_and_no_second_rehearsal() -> None:
    calls: list[str] = []
    found = alternate_within({"slow": lambda: calls.append("slow")}, runs=20, seconds=0, device=CPU)
    assert len(found["slow"]) == 1
    assert len(calls) == 2


@pytest.mark.parametrize(("seconds", "once", "turns"), [(60, 0.1, 20), (60, 10, 6), (60, 45, 1), (60, 90, 1)])
def test_turns_fill_the_time(seconds: float, once: float, turns: int) -> None:
    assert turns_within(seconds, once, 20) == turns


@pytest.mark.parametrize("turns", range(1, 21))
def test_turns_are_spread(turns: int) -> None:
    rounds = [number for number in range(20) if is_due(number, turns, 20)]
    assert len(rounds) == turns
    gaps = [after - before for before, after in pairwise(rounds)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_a_cpu_computes_in_float32_unless_told_otherwise() -> None:
    assert place("cpu", "auto") == (torch.device("cpu"), torch.float32)
    assert place("cpu", "bfloat16") == (torch.device("cpu"), torch.bfloat16)


def test_auto_takes_what_is_there() -> None:
    device, dtype = place("auto", "auto")
    assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert dtype == (torch.bfloat16 if device.type == "cuda" else torch.float32)


@pytest.mark.parametrize(("device", "dtype"), [("nope", "auto"), ("cuda:99", "auto"), ("cpu", "int8"), ("cpu", "nope")])
def test_what_is_not_there(device: str, dtype: str) -> None:
    with pytest.raises(ConfigError, match=device if device != "cpu" else dtype) as caught:
        place(device, dtype)
    assert "\n" not in str(caught.value)


RISING = Panel("rising", "step", "ms", {"full": [(1, 1.0), (8, 9.0)], "statekv": [(1, 1.0), (8, 1.5)]})
LOG = Panel("log", "budget", "ms", {"sdpa": [(256, 1.0), (4096, 12.0)]}, log_x=True, log_y=True)


BARS = Bars("bars", "times", {"full": (1.0, 1.0, 1.0), "a method with a long name": (0.7, 0.5, 0.9)}, mark=1.0)


@pytest.mark.parametrize("panels", [[RISING], [BARS], [RISING, BARS, LOG, RISING, LOG]])
def test_a_png_with_something_on_it(tmp_path: Path, panels: list[Panel | Bars]) -> None:
    path = tmp_path / "new" / "picture.png"
    draw(panels, path, "a title")
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.width >= 600
        found = picture.convert("RGB").getcolors(1 << 24)
    assert found is not None
    assert len(found) > 30


def test_other_points_give_another_picture(tmp_path: Path) -> None:
    lower = replace(BARS, lines={name: (value / 2, 0.1, high) for name, (value, _, high) in BARS.lines.items()})
    draw([BARS], tmp_path / "bars.png")
    draw([lower], tmp_path / "lower.png")
    assert (tmp_path / "bars.png").read_bytes() != (tmp_path / "lower.png").read_bytes()
    flat = Panel("rising", "step", "ms", {name: [(x, 1.0) for x, _ in line] for name, line in RISING.lines.items()})
    for name, panel in (("rising", RISING), ("again", RISING), ("flat", flat)):
        draw([panel], tmp_path / f"{name}.png")
    rising, again, other = ((tmp_path / f"{name}.png").read_bytes() for name in ("rising", "again", "flat"))
    assert rising == again != other
