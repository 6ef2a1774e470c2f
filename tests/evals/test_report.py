"""The report's figures against those computed by hand; shards put together, gaps and doubles told."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from statekv.errors import ConfigError
from statekv.evals.report import Figures, draw, figures, find, interval, load, merge
from statekv.evals.results import ResultFile, read
from statekv.evals.task import Rows
from tests.evals.small import header, lines


def write(path: Path, *videos: list[dict[str, Any]], method: str = "full", **changes: Any) -> Path:
    file = ResultFile(path, header(method, **changes))
    for video in videos:
        file.append(video)
    return path


def only(path: Path) -> Figures:
    (found,) = load([path])
    return found


def test_figures_of_one_run(tmp_path: Path) -> None:
    columns = {"kl": 0.5, "agrees": True}
    a, b = lines("a", [True, False], 3000, **columns), lines("b", [True, True], 5000, kl=0.1, agrees=False)
    found = only(write(tmp_path / "x.jsonl", a, b, method="statekv", budget=100))
    assert (found.task, found.variant, found.model) == ("cards", "1024 frames", "demo")
    assert (found.method, found.budget, found.questions, found.videos) == ("statekv", 100, 4, 2)
    assert found.headlines == {"accuracy": 0.75, "color": 0.75, "early": 0.75}
    assert (found.low, found.high) == (0.5, 1.0)  # either video twice
    assert found.kl == pytest.approx(0.3)
    assert found.agreement == 0.5
    assert found.chance == 0.25
    assert found.flops == 4000
    assert (found.difference, found.difference_low, found.difference_high) == (None, None, None)
    assert found.paper is None
    assert found.notes == ()


def test_differences_are_paired(tmp_path: Path) -> None:
    write(tmp_path / "full.jsonl", *(lines(f"v{n}", [True, bool(n % 2)]) for n in range(20)))
    write(tmp_path / "x.jsonl", *(lines(f"v{n}", [n > 0, bool(n % 2)]) for n in range(20)), method="random")
    full, random = load([tmp_path])
    assert full.difference is None
    assert random.difference == pytest.approx(-1 / 40)
    assert random.difference_low is not None
    assert random.difference_high is not None
    assert -0.1 < random.difference_low < random.difference_high == 0  # far narrower than either accuracy's
    assert random.high - random.low > 0.1


def test_only_questions_of_both_are_compared(tmp_path: Path) -> None:
    write(tmp_path / "full.jsonl", lines("a", [True, True]), lines("c", [False]))
    write(tmp_path / "x.jsonl", lines("a", [True]), lines("b", [False, False]), method="random")
    full, random = load([tmp_path])
    assert random.difference == 0
    assert random.headlines["accuracy"] == pytest.approx(1 / 3)
    assert full.headlines["accuracy"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("changes", [{"model": "other"}, {"variant": "512 frames"}, {"layout": "release"}])
def test_full_attention_elsewhere_is_no_reference(tmp_path: Path, changes: dict[str, Any]) -> None:
    write(tmp_path / "full.jsonl", lines("a", [True]))
    write(tmp_path / "x.jsonl", lines("a", [False]), method="random", **changes)
    assert [run.difference for run in load([tmp_path])] == [None, None]


def test_shards_are_put_together(tmp_path: Path) -> None:
    write(tmp_path / "0.jsonl", lines("a", [True]), shard="0/2")
    assert only(tmp_path).notes == ("shard 1/2 is missing",)
    write(tmp_path / "1.jsonl", lines("b", [False]), shard="1/2")
    found = only(tmp_path)
    assert (found.questions, found.videos, found.headlines["accuracy"], found.notes) == (2, 2, 0.5, ())


def test_questions_answered_twice_count_once(tmp_path: Path) -> None:
    write(tmp_path / "0.jsonl", lines("a", [True, True]))
    write(tmp_path / "1.jsonl", lines("a", [True, False]), lines("b", [False]), shard="0/2")
    found = only(tmp_path)
    assert found.questions == 3
    assert found.headlines["accuracy"] == pytest.approx(2 / 3)
    assert found.notes == ("2 questions were answered twice, 1 of them differently; the first counts",)


def test_shards_of_other_versions_are_told(tmp_path: Path) -> None:
    write(tmp_path / "0.jsonl", lines("a", [True]), shard="0/2")
    write(tmp_path / "1.jsonl", lines("b", [True]), shard="1/2", versions={"torch": "3"})
    assert only(tmp_path).notes == ("shards ran on different versions of packages",)


def test_failed_videos_are_counted_unless_another_shard_has_them(tmp_path: Path) -> None:
    lost = [[{"type": "failed", "video": video, "reason": "is not there"}] for video in ("a", "b")]
    write(tmp_path / "0.jsonl", *lost)
    assert only(tmp_path).failed == {"a": "is not there", "b": "is not there"}
    write(tmp_path / "1.jsonl", lines("a", [True]))
    found = only(tmp_path)
    assert (found.failed, found.videos) == ({"b": "is not there"}, 1)


def test_a_run_in_which_everything_failed(tmp_path: Path) -> None:
    found = only(write(tmp_path / "0.jsonl", [{"type": "failed", "video": "a", "reason": "is not there"}]))
    assert (found.questions, found.kl, found.agreement) == (0, None, None)
    assert math.isnan(found.headlines["accuracy"])
    assert math.isnan(found.flops)


@pytest.mark.parametrize(
    ("method", "settings", "name", "budget"),
    [
        ("full", {}, "full", None),
        ("statekv", {"budget": 7}, "statekv", 7),
        ("uniform", {}, "uniform", None),
        ("rekv", {"budget": 7}, "rekv", 7),
        ("rekv", {"pin_prefix": False}, "recent+retrieve", 4096),
        ("statekv", {"layout": "release", "seed": 3}, "statekv layout=release seed=3", 4096),
        ("uniform", {"max_frames": 32}, "uniform max_frames=32", None),
        ("last_frames", {"last_frames": 8, "horizon": 99}, "last_frames last_frames=8", None),
        ("statekv", {"memory": "8GiB", "bits": 4, "disk": 1025}, "statekv memory=8GiB disk=1025 bits=4", 4096),
        ("full", {"horizon": 99, "on_horizon": "compact"}, "full horizon=99 on_horizon=compact", None),
    ],
)
def test_names_tell_what_is_out_of_the_ordinary(
    tmp_path: Path, method: str, settings: dict[str, Any], name: str, budget: int | None
) -> None:
    found = only(write(tmp_path / "x.jsonl", lines("a", [True]), method=method, **settings))
    assert (found.method.split(" pin_prefix")[0], found.budget) == (name, budget)


def test_runs_are_told_apart_by_every_setting(tmp_path: Path) -> None:
    write(tmp_path / "0.jsonl", lines("a", [True]), method="random", seed=0)
    write(tmp_path / "1.jsonl", lines("a", [True]), method="random", seed=1)
    assert len(merge([read(path) for path in find([tmp_path])])) == 2


def test_beside_the_paper(tmp_path: Path) -> None:
    model = "OpenGVLab/InternVL3-1B-hf"
    named: dict[str, Any] = {"max_frames": 512, "task": "mlvu", "variant": "", "model": model}
    write(tmp_path / "0.jsonl", lines("a", [True]), **named)
    write(tmp_path / "1.jsonl", lines("a", [True]), **named, method="statekv")
    assert [run.paper for run in load([tmp_path])] == pytest.approx([0.4705, 0.4635])


def test_files_and_folders(tmp_path: Path) -> None:
    one, two = (write(tmp_path / "deep" / name, lines("a", [True])) for name in ("1.jsonl", "2.jsonl"))
    assert find([tmp_path, two, one]) == [one, two]


@pytest.mark.parametrize("name", ["", "none.jsonl"])
def test_nothing_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="no results"):
        find([tmp_path / name])


def test_a_task_that_is_not_known_any_more(tmp_path: Path) -> None:
    path = write(tmp_path / "0.jsonl", lines("a", [True]), task="gone")
    with pytest.raises(ConfigError, match="unknown task 'gone'"):
        figures(merge([read(path)]))


def rows_of(scores: Sequence[Sequence[bool]]) -> dict[str, list[Mapping[str, Any]]]:
    """Rows of each video."""
    return {f"v{number}": [{"score": score} for score in video] for number, video in enumerate(scores)}


def mean(rows: Rows) -> float:
    return sum(bool(row["score"]) for row in rows) / len(rows)


def test_independent_videos_have_the_binomial_width() -> None:
    scores = np.random.default_rng(1).random(400) < 0.7
    low, high = interval(rows_of([[score] for score in scores]), mean)
    share = scores.mean()
    half = 1.96 * math.sqrt(share * (1 - share) / 400)
    assert low == pytest.approx(share - half, abs=0.008)
    assert high == pytest.approx(share + half, abs=0.008)


def test_questions_of_one_video_count_as_one() -> None:
    scores = np.random.default_rng(2).random(100) < 0.6
    once = interval(rows_of([[score] for score in scores]), mean)
    five_times = interval(rows_of([[score] * 5 for score in scores]), mean)
    assert five_times == pytest.approx(once)


def test_what_both_get_wrong_does_not_widen_the_difference() -> None:
    ours = [[bool(number % 2)] * 2 for number in range(50)]
    theirs = [list(video) for video in ours]
    assert interval(rows_of(ours), mean, rows_of(theirs)) == (0.0, 0.0)
    theirs[0] = [not score for score in theirs[0]]
    low, high = interval(rows_of(ours), mean, rows_of(theirs))
    assert -0.1 < low < 0 == high


def test_the_same_every_time() -> None:
    rows = rows_of([[True, False], [False], [True]] * 5)
    assert interval(rows, mean) == interval(dict(reversed(rows.items())), mean)


@pytest.mark.parametrize("videos", [0, 1])
def test_too_few_videos_tell_nothing(videos: int) -> None:
    assert all(math.isnan(end) for end in interval(rows_of([[True, False]] * videos), mean))


RUN = Figures(
    task="cards",
    variant="1024 frames",
    model="demo",
    method="full",
    budget=None,
    fps=1.0,
    max_frames=None,
    frames=600.0,
    questions=100,
    videos=10,
    failed={},
    headlines={"accuracy": 0.8, "count": 0.5},
    low=0.7,
    high=0.9,
    difference=None,
    difference_low=None,
    difference_high=None,
    kl=0.0,
    agreement=1.0,
    chance=0.3,
    flops=2e11,
    paper=None,
    notes=(),
)
SMALL = replace(RUN, method="statekv", budget=100, headlines={"accuracy": 0.7}, flops=5e10, low=0.6, high=0.72)
LARGE = replace(SMALL, budget=200, headlines={"accuracy": 0.75}, flops=7e10, high=0.8)


def pixels(path: Path) -> bytes:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300
        return picture.convert("RGB").tobytes()


def test_every_run_changes_the_picture(tmp_path: Path) -> None:
    drawn = []
    for number, runs in enumerate(([RUN], [RUN, SMALL], [RUN, SMALL, LARGE])):
        path = tmp_path / "new" / f"{number}.png"
        draw(runs, path)
        drawn.append(pixels(path))
    assert len(set(drawn)) == 3


def test_methods_of_one_cost_are_set_apart(tmp_path: Path) -> None:
    draw([RUN, SMALL, replace(SMALL, method="random")], tmp_path / "both.png")
    with Image.open(tmp_path / "both.png") as picture:
        axes = picture.convert("RGB").crop((0, 0, int(0.7 * picture.width), picture.height))  # without the legend
    counts = {color: count for count, color in axes.getcolors(1 << 24) or []}
    assert counts[(255, 127, 14)] > 10  # of the second method, orange, which the third would hide


def test_runs_without_questions_or_intervals_are_no_obstacle(tmp_path: Path) -> None:
    nan = float("nan")
    failed = replace(SMALL, method="random", questions=0, headlines={"accuracy": nan}, flops=nan, chance=nan)
    draw([failed, replace(RUN, low=nan, high=nan)], tmp_path / "some.png")
    draw([RUN], tmp_path / "one.png")
    assert pixels(tmp_path / "some.png") != b""


@pytest.mark.parametrize(
    ("runs", "told"),
    [
        ([], "of nothing"),
        ([replace(RUN, questions=0)], "of nothing"),
        ([RUN, replace(SMALL, model="other")], "cards, 1024 frames, demo; cards, 1024 frames, other"),
        ([RUN, replace(SMALL, task="mlvu", variant="")], "cards, 1024 frames, demo; mlvu, demo"),
    ],
)
def test_what_does_not_belong_together(tmp_path: Path, runs: list[Figures], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        draw(runs, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
