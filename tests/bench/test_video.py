"""Rows of `bench video`, on a film of the demo's world."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import statekv
from statekv.bench.video import OVERLAPPED, PARTS, SEQUENTIAL, Timed, measure, watch
from statekv.engine.engine import Engine
from statekv.errors import VideoError
from statekv.evals.cards.render import write_film
from statekv.evals.cards.world import write_story
from statekv.video.frame import Frame

SECONDS = 20


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    write_film(write_story(1_000_000_123, SECONDS), path)
    return path


@pytest.fixture(scope="module")
def engine() -> Engine:
    return statekv.load("demo", budget=64)


@pytest.mark.parametrize("overlapped", [False, True])
def test_a_pass_sees_the_whole_film(engine: Engine, film: Path, overlapped: bool) -> None:
    seen = watch(engine, film, overlapped=overlapped)
    assert seen.frames == len(seen.course) == SECONDS
    assert seen.video_seconds == pytest.approx(SECONDS)
    assert set(seen.parts) == set(PARTS)
    assert (seen.parts["waiting"] > 0) == overlapped
    work = [seconds for seconds, _ in seen.course]
    assert work == sorted(work)
    assert work[-1] <= seen.total


def test_in_line_the_parts_add_up(engine: Engine, film: Path) -> None:
    seen = watch(engine, film, overlapped=False)
    assert sum(seen.parts.values()) <= seen.total


def test_rows_and_picture(engine: Engine, film: Path) -> None:
    rows, (panel,) = measure(engine, film, runs=2)
    rates, parts = rows[:2], rows[2:]
    assert [(row.subject, row.unit) for row in rates] == [(SEQUENTIAL, "video s/s"), (OVERLAPPED, "video s/s")]
    expected = [(kind, part) for kind in (SEQUENTIAL, OVERLAPPED) for part in ("all", *PARTS)]
    assert [(row.subject, row.setting["part"]) for row in parts] == expected
    assert all(len(row.samples) == 2 for row in rows)
    assert {row.setting["frames"] for row in rows} == {SECONDS}
    assert [row.floor is not None for row in parts] == [row.setting["part"] == "all" for row in parts]
    assert list(panel.lines) == [SEQUENTIAL, OVERLAPPED]


def test_both_ways_make_the_same_memory(engine: Engine, film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed is what `Engine.open` does."""
    kept = {}
    for kind in (SEQUENTIAL, OVERLAPPED, "open"):
        with engine.open(film) as session:
            monkeypatch.setattr(engine, "open", lambda _, session=session: session)
            monkeypatch.setattr(session, "close", lambda: None)
            if kind == "open":
                session.watch()
            else:
                watch(engine, film, overlapped=kind == OVERLAPPED)
            kept[kind] = [session.state.detailed.keys(layer).clone() for layer in range(session.state.spec.layers)]
            monkeypatch.undo()
    for kind in (SEQUENTIAL, OVERLAPPED):
        assert all(torch.equal(one, other) for one, other in zip(kept[kind], kept["open"], strict=True))


def test_one_frame_is_no_video(engine: Engine, film: Path) -> None:
    with pytest.raises(VideoError, match=r"holds 1 frames at this rate \(give a longer video or more fps\)"):
        watch(Engine(engine.model, engine.config.with_(max_frames=1)), film, overlapped=True)


def test_an_iterator_knows_its_time_and_its_end() -> None:
    frames = [Frame(torch.zeros(3, 2, 2, dtype=torch.uint8), float(second)) for second in range(3)]
    timed = Timed(iter(frames))
    assert list(timed) == frames
    assert timed.seconds > 0
