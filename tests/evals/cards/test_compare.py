"""Methods side by side: the same questions for each, distances from full attention, every step timed."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from statekv.engine.engine import Engine, load
from statekv.evals.cards.compare import METHODS, REFERENCE, MethodResult, compare, draw_step_times
from statekv.evals.cards.world import FIRST_TEST_SEED, KINDS, write_story
from statekv.video.file import probe

VIDEOS, FRAMES, BUDGET = 2, 24, 40
# Of a test story with one card, which allows no question of order.
LONELY = next(seed for seed in range(FIRST_TEST_SEED, FIRST_TEST_SEED + 100) if len(write_story(seed, 20.0).cards) == 1)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = load("demo")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compare") / "made" / "here"


@pytest.fixture(scope="module")
def told() -> list[int]:
    return []


@pytest.fixture(scope="module")
def results(engine: Engine, folder: Path, told: list[int]) -> dict[str, MethodResult]:
    found = compare(engine, folder, videos=VIDEOS, frames=FRAMES, budget=BUDGET, per_kind=1, on_video=told.append)
    assert [result.method for result in found] == list(METHODS)
    return {result.method: result for result in found}


def tokens_of(engine: Engine, path: Path) -> int:
    with engine.open(path, method="full") as session:
        session.watch()
        return session.state.tokens


def test_videos_are_test_stories_and_stay(results: dict[str, MethodResult], folder: Path, told: list[int]) -> None:
    assert told == list(range(VIDEOS))
    assert sorted(path.name for path in folder.iterdir()) == ["cards-0.mp4", "cards-1.mp4"]
    assert probe(folder / "cards-0.mp4").duration_seconds == FRAMES
    colors = [set(_asked_colors(results, video)) for video in range(VIDEOS)]
    stories = [{card.color for card in write_story(FIRST_TEST_SEED + i, FRAMES).cards} for i in range(VIDEOS)]
    assert colors[0] | colors[1] <= stories[0] | stories[1]


def _asked_colors(results: dict[str, MethodResult], video: int) -> Iterator[str]:
    for row in results[REFERENCE].rows:
        if row["kind"] == "color":
            yield str(row["expected"])


def test_the_reference_is_full_attention_over_all_tokens(
    results: dict[str, MethodResult], engine: Engine, folder: Path
) -> None:
    full = results[REFERENCE]
    assert REFERENCE == "full"
    assert full.kl == [0.0] * len(full.rows)
    assert full.carried == max(tokens_of(engine, folder / f"cards-{i}.mp4") for i in range(VIDEOS))
    assert full.bytes_carried == 0


def test_every_method_gets_the_same_questions(results: dict[str, MethodResult]) -> None:
    def questions(result: MethodResult) -> list[dict[str, object]]:
        return [{name: value for name, value in row.items() if name != "answered"} for row in result.rows]

    expected = questions(results[REFERENCE])
    assert len(expected) > 10
    assert {row["kind"] for row in expected} == set(KINDS)
    for result in results.values():
        assert questions(result) == expected
        assert len(result.kl) == len(expected)
        assert all(math.isfinite(kl) and kl >= -1e-6 for kl in result.kl)
        assert all(isinstance(row["answered"], str) for row in result.rows)


@pytest.mark.parametrize("method", [method for method in METHODS if method != REFERENCE])
def test_a_small_budget_is_kept_and_is_not_full_attention(results: dict[str, MethodResult], method: str) -> None:
    result = results[method]
    assert result.carried == BUDGET
    assert 0 < result.bytes_carried < results[REFERENCE].bytes_detailed
    assert max(result.kl) > 1e-6


def test_every_step_is_timed(results: dict[str, MethodResult]) -> None:
    for result in results.values():
        assert [len(steps) for steps in result.step_ms] == [FRAMES] * VIDEOS
        assert all(ms > 0 for steps in result.step_ms for ms in steps)


def test_a_summary_is_what_the_rows_say(results: dict[str, MethodResult]) -> None:
    result = results["statekv"]
    summary = result.summary()
    right = [row["answered"] == row["expected"] for row in result.rows]
    assert summary["accuracy"] == sum(right) / len(right)
    assert summary["questions"] == len(right)
    by_kind = summary["accuracy_by_kind"]
    assert isinstance(by_kind, dict)
    whens = [r for r, row in zip(right, result.rows, strict=True) if row["kind"] == "when"]
    assert by_kind["when"] == sum(whens) / len(whens)
    chances = [float(str(row["chance"])) for row in result.rows]
    assert summary["chance"] == pytest.approx(sum(chances) / len(chances))
    assert summary["kl_to_full"] == pytest.approx(sum(result.kl) / len(result.kl))


def test_tenths_are_medians_over_all_videos() -> None:
    result = MethodResult("x", step_ms=[[float(i) for i in range(20)], [100.0 + i for i in range(20)]])
    assert result.tenth_ms(0) == 50.5  # of 0, 1, 100, 101
    assert result.tenth_ms(9) == 68.5  # of 18, 19, 118, 119


@pytest.mark.parametrize("steps", range(20, 41))
def test_tenths_cover_every_step_once(steps: int) -> None:
    counts = []
    for tenth in range(10):
        result = MethodResult("x", step_ms=[[float(i) for i in range(steps)]])
        counts.append(result.tenth_ms(tenth))
    assert counts == sorted(set(counts))


@functools.cache
def _unlimited(engine: Engine, folder: Path) -> list[MethodResult]:
    return compare(engine, folder, videos=1, frames=20, budget=10_000, per_kind=1, first_seed=FIRST_TEST_SEED + 3)


@pytest.mark.parametrize("method", METHODS)
def test_with_a_budget_for_all_tokens_every_method_is_full_attention(engine: Engine, folder: Path, method: str) -> None:
    found = {result.method: result for result in _unlimited(engine, folder.parent / "unlimited")}
    assert found[method].rows == found[REFERENCE].rows
    assert max(map(abs, found[method].kl)) < 1e-6
    assert found[method].carried == found[REFERENCE].carried


@pytest.fixture
def few_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all are told alike: the reference, the method, and the one that draws."""
    monkeypatch.setattr("statekv.evals.cards.compare.METHODS", (REFERENCE, "statekv", "random"))


@pytest.mark.usefixtures("few_methods")
def test_a_summary_is_json_also_where_a_kind_was_never_asked(engine: Engine, tmp_path: Path) -> None:
    found = compare(engine, tmp_path, videos=1, frames=20, budget=40, per_kind=1, first_seed=LONELY)
    assert "first" not in {row["kind"] for row in found[0].rows}
    for result in found:
        json.dumps(result.summary(), allow_nan=False)  # NaN is no JSON


@pytest.mark.usefixtures("few_methods")
def test_the_same_videos_give_the_same_numbers(results: dict[str, MethodResult], engine: Engine, folder: Path) -> None:
    again = compare(engine, folder, videos=1, frames=FRAMES, budget=BUDGET, per_kind=1)
    for result in again:
        first = results[result.method]
        assert result.rows == first.rows[: len(result.rows)]
        assert result.kl == first.kl[: len(result.kl)]


FLAT = MethodResult("statekv", step_ms=[[2.0] * 64, [2.5] * 64])
RISING = MethodResult("full", step_ms=[[1.0 + 0.1 * i for i in range(64)]] * 2)


def colors(path: Path) -> int:
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG"
        assert min(picture.size) > 200
        found = picture.convert("RGB").getcolors(1 << 24)
    assert found is not None
    return len(found)


def test_a_png_with_something_on_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "times.png"
    draw_step_times([RISING, FLAT], path, "64 frames")
    assert colors(path) > 30


def test_lines_that_differ_give_pictures_that_differ(tmp_path: Path) -> None:
    pictures = []
    for index, result in enumerate((FLAT, RISING)):
        draw_step_times([MethodResult("x", step_ms=result.step_ms)], tmp_path / f"{index}.png", "")
        pictures.append((tmp_path / f"{index}.png").read_bytes())
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize("steps", [1, 15, 20])
def test_few_steps_can_be_drawn(tmp_path: Path, steps: int) -> None:
    draw_step_times([MethodResult("full", step_ms=[[1.0] * steps])], tmp_path / "few.png", "")
    assert colors(tmp_path / "few.png") > 1
