"""A task with several configurations: what comes out is what a session alone would say, whatever happens on the way."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from statekv.config import Config
from statekv.engine.engine import Engine
from statekv.engine.session import Session
from statekv.errors import ConfigError
from statekv.evals import runner
from statekv.evals.results import Results, Shard, read
from statekv.evals.runner import FrameQueue, Stream, evaluate, watch
from statekv.evals.task import Broken, EvalVideo
from statekv.models.encoded import EncodedStep
from statekv.models.flops import Widths, step_flops
from statekv.video.frame import Frame
from tests.evals.small import SETTINGS, Small, question, videos_of, write_clips
from tests.talk import shared_engine

BUDGET = 30
CONFIGS = {
    "statekv": Config.of("statekv", budget=BUDGET, **SETTINGS),
    "full": Config.of("full", **SETTINGS),
    "random": Config.of("random", budget=BUDGET, **SETTINGS),
    "statekv_retrieve": Config.of("statekv_retrieve", budget=BUDGET, retrieve=2, **SETTINGS),
    "last_frames": Config.of("last_frames", last_frames=3, **SETTINGS),
    "uniform": Config.of("uniform", max_frames=4, **SETTINGS),
    "full_of_6": Config.of("full", max_frames=6, **SETTINGS),
}
TWO = {name: CONFIGS[name] for name in ("statekv", "full")}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_clips(tmp_path_factory.mktemp("clips"), 3)


def run(out: Path, task: Small, configs: Mapping[str, Config] = TWO, **options: Any) -> dict[str, Results]:
    evaluate(shared_engine("internvl"), task, configs, out, model="tiny", **options)
    return {path.name.split(".")[0]: read(path) for path in sorted(out.iterdir())}


def alone(engine: Engine, path: Path, name: str, at_seconds: float | None, until: float | None) -> Session:
    """A session that has watched by itself what a question may see."""
    config = CONFIGS[name]
    if config.uniform:
        ends = [end for end in (until, None if at_seconds is None else at_seconds + 1) if end is not None]
        session = engine.open(path, until_seconds=min(ends, default=None), **config.settings)
        session.watch()
        return session
    session = engine.open(path, until_seconds=until, **config.settings)
    session.watch(until_seconds=at_seconds)
    return session


@pytest.mark.parametrize(("family", "until"), [("internvl", None), ("qwen3_vl", 7.0)])
def test_side_by_side_is_as_alone(family: str, until: float | None, clips: list[Path]) -> None:
    engine, times = shared_engine(family), (2.0, 5.0, None)
    asked = tuple(question(str(at), at, f"What happens at {at}?") for at in times)
    found = watch(engine, Small([]), EvalVideo("v", clips[0], asked, until), CONFIGS)
    for place, at in enumerate(times):
        text = f"What happens at {at}?"
        with alone(engine, clips[0], "full", at, until) as full:
            first, expected = full.logits(text)[0].log_softmax(-1), full.ask(text).strip()
        for name in CONFIGS:
            row = found[name][place]
            with alone(engine, clips[0], name, at, until) as session:
                assert row["answered"] == session.ask(text).strip()
                assert row["frames"] == session.frames
                assert row["tokens"] == session.state.tokens or name == "last_frames"
                own = session.logits(text)[0].log_softmax(-1)
            assert row["kl"] == pytest.approx(float((first.exp() * (first - own)).sum()), abs=1e-6)
            assert row["agrees"] == (row["answered"] == expected)
    assert all(lines[-1]["type"] == "video" and len(lines) == 4 for lines in found.values())


def test_frames_are_decoded_and_looked_at_once(clips: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = shared_engine("internvl")
    looked: list[Sequence[Frame]] = []
    look = engine.model.encode

    def noted(steps: Sequence[Sequence[Frame]], frames_expected: int | None = None) -> list[EncodedStep]:
        looked.extend(steps)
        return look(steps, frames_expected)

    monkeypatch.setattr(engine.model, "encode", noted)
    asked = (question("a", 4.0), question("b"))
    watch(engine, Small([]), EvalVideo("v", clips[0], asked), {name: CONFIGS[name] for name in ("full", "statekv")})
    assert [step[0].pts_seconds for step in looked] == list(range(11))


def test_the_rows_say_everything(clips: list[Path], tmp_path: Path) -> None:
    found = run(tmp_path, Small(videos_of(clips[:1])))
    assert set(found) == {"full", "statekv"}
    for name, results in found.items():
        assert results.header.config == TWO[name].facts
        assert (results.header.task, results.header.model, results.header.shard) == ("small", "tiny", "0/1")
        assert results.header.versions["torch"] == torch.__version__
        first, last = results.questions
        assert (first["id"], first["at_seconds"], first["frames"]) == ("q0a", 3.0, 4)
        assert (last["id"], last["at_seconds"], last["frames"]) == ("q0b", None, 11)
        assert (first["kind"], first["group"], first["expected"], first["chance"]) == (
            "any",
            "short",
            "something",
            0.25,
        )
        assert first["score"] == bool(first["answered"])
        assert first["exact"] is False
        assert last["tokens"] > first["tokens"] > 0
    assert [row["kl"] for row in found["full"].questions] == [0.0, 0.0]
    assert all(row["agrees"] for row in found["full"].questions)


def test_without_full_nothing_is_compared(clips: list[Path], tmp_path: Path) -> None:
    found = run(tmp_path, Small(videos_of(clips[:1])), {"statekv": CONFIGS["statekv"]})
    assert not any({"kl", "agrees"} & row.keys() for row in found["statekv"].questions)


def contents(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """All lines of all files, but for the clock's."""
    timed = ("prefill_seconds", "answer_seconds")
    return {
        path.name: [
            {name: value for name, value in json.loads(line).items() if name not in timed}
            for line in path.read_text(encoding="utf-8").splitlines()
        ]
        for path in sorted(folder.iterdir())
    }


def test_what_is_complete_is_not_done_again(clips: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = Small(videos_of(clips))
    run(tmp_path, task)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(runner, "watch", lambda *_: pytest.fail("watched again"))
    run(tmp_path, task)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("torn", ["full", "statekv"])
def test_after_a_kill_the_rest_is_done(torn: str, clips: list[Path], tmp_path: Path) -> None:
    task = Small(videos_of(clips))
    run(tmp_path / "whole", task)
    run(tmp_path / "torn", task)
    path = tmp_path / "torn" / f"{torn}.0-of-1.jsonl"
    written = path.read_bytes()
    path.write_bytes(written[: written.rindex(b'"q2b"')])
    watched: list[str] = []
    run(tmp_path / "torn", task, on_video=lambda video, _: watched.append(video))
    assert watched == ["v2"]
    assert contents(tmp_path / "torn") == contents(tmp_path / "whole")


def test_shards_are_the_whole(clips: list[Path], tmp_path: Path) -> None:
    task = Small(videos_of(clips))
    whole = run(tmp_path / "whole", task)["statekv"]
    for index in (0, 1):
        run(tmp_path / "parts", task, shard=Shard(index, 2))
    parts = [read(tmp_path / "parts" / f"statekv.{index}-of-2.jsonl") for index in (0, 1)]
    assert [list(part.videos) for part in parts] == [["v0", "v2"], ["v1"]]
    order = [row["id"] for row in whole.questions]
    assert sorted(parts[0].questions + parts[1].questions, key=lambda row: order.index(row["id"])) == whole.questions


def test_the_first_videos_alone(clips: list[Path], tmp_path: Path) -> None:
    assert list(run(tmp_path, Small(videos_of(clips)), most=2)["full"].videos) == ["v0", "v1"]


def test_videos_that_fail_are_told_and_the_run_goes_on(clips: list[Path], tmp_path: Path) -> None:
    text = clips[0].parent / "text.mp4"
    text.write_text("no video", encoding="utf-8")
    broken: list[EvalVideo | Broken] = [
        EvalVideo("lost", clips[0].parent / "lost.mp4", (question("lost"),)),
        EvalVideo("text", text, (question("text"),)),
        Broken("line 3", "is not JSON"),
    ]
    told: dict[str, Mapping[str, str]] = {}
    found = run(tmp_path, Small([*broken, *videos_of(clips[:1])]), on_video=lambda v, f: told.update({v: f}))
    for results in found.values():
        assert list(results.videos) == ["v0"]
        assert set(results.failed) == {"lost", "text", "line 3"}
        assert results.failed["line 3"] == "is not JSON"
        assert "lost.mp4" in results.failed["lost"]
        assert not any("\n" in reason for reason in results.failed.values())
    assert [set(failures) for failures in told.values()] == [{"full", "statekv"}] * 3 + [set()]
    assert list(told) == ["lost", "text", "line 3", "v0"]


def test_a_video_that_cannot_be_read_on_fails_alone(
    clips: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shared_engine("internvl").model
    look, calls = model.encode, iter(range(100))

    def look_until_memory_ends(*args: Any) -> Any:
        if next(calls) == 1:
            raise MemoryError
        return look(*args)

    monkeypatch.setattr(model, "encode", look_until_memory_ends)
    found = run(tmp_path, Small(videos_of(clips[:2])))
    for results in found.values():
        assert "out of memory" in results.failed["v0"]
        assert list(results.videos) == ["v1"]


def test_a_video_that_comes_back_is_done(clips: list[Path], tmp_path: Path) -> None:
    lost = clips[0].parent / "found.mp4"
    task = Small([EvalVideo("v", lost, (question("q"),))])
    run(tmp_path, task)
    size = (tmp_path / "full.0-of-1.jsonl").stat().st_size
    assert list(run(tmp_path, task)["full"].failed) == ["v"]
    assert (tmp_path / "full.0-of-1.jsonl").stat().st_size == size  # the same reason is not told twice
    lost.write_bytes(clips[0].read_bytes())
    found = run(tmp_path, task)["full"]
    assert (list(found.videos), found.failed) == (["v"], {})


def test_one_configuration_that_fails_leaves_the_others_alone(clips: list[Path], tmp_path: Path) -> None:
    short = replace(CONFIGS["full"], horizon=60)
    found = run(tmp_path, Small(videos_of(clips[:1])), {**TWO, "short": short})
    assert "past" in found["short"].failed["v0"]
    assert not found["short"].questions
    assert len(found["full"].questions) == len(found["statekv"].questions) == 2


def test_ids_that_come_twice_are_told(clips: list[Path], tmp_path: Path) -> None:
    first, second = videos_of(clips[:2])
    other = EvalVideo("other", clips[2], (question("q0a"),))
    found = run(tmp_path, Small([first, first, other, second]))["full"]
    assert list(found.videos) == ["v0", "v1"]
    assert list(found.failed) == ["v0 (record 1)", "other"]
    assert "q0a" in found.failed["other"]


def test_results_of_another_run_are_refused(clips: list[Path], tmp_path: Path) -> None:
    task = Small(videos_of(clips[:1]))
    run(tmp_path, task)
    with pytest.raises(ConfigError, match=r"budget 31 instead of 30 .*--out"):
        run(tmp_path, task, {"statekv": replace(CONFIGS["statekv"], budget=31)})


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"), 1)[0]


def stream_of(clip: Path, method: str, **settings: object) -> Stream:
    return Stream(shared_engine("internvl"), clip, Config.of(method, **SETTINGS, **settings))


def widths() -> Widths:
    return Widths.of(shared_engine("internvl").model.text_config)


@pytest.mark.parametrize(
    ("method", "budget", "products"),
    [
        ("full", None, 2),
        ("random", 40, 2),
        ("recency_window", 40, 2),
        ("streaming_llm", 40, 2),
        ("statekv", 40, 3),
        ("statekv_retrieve", 40, 3),
    ],
)
def test_flops_are_those_of_the_steps(clip: Path, method: str, budget: int | None, products: int) -> None:
    stream = stream_of(clip, method, budget=budget or 4096)
    FrameQueue([stream]).advance(None)
    whole = stream_of(clip, "full")
    FrameQueue([whole]).advance(None)
    lengths = [span.length for span in whole.session.state.spans]
    stream.ask("What happens?")
    for each in (stream, whole):
        each.close()
    assert len(lengths) == 12  # the prefix and eleven frames; some streams forget their older steps
    assert stream.flops == sum(step_flops(widths(), lengths, budget, products))


def test_uniform_pays_for_every_time_it_reads(clip: Path) -> None:
    stream, paid = stream_of(clip, "uniform", max_frames=4), 0
    for at_seconds in (3.0, None):
        stream.arrive(at_seconds)
        assert stream.session.frames == 4
        paid += sum(step_flops(widths(), [span.length for span in stream.session.state.spans]))
        stream.ask("What happens?")
    stream.close()
    assert stream.flops == paid


def test_the_newest_frames_are_paid_for_at_every_question(clip: Path) -> None:
    engine, stream = shared_engine("internvl"), stream_of(clip, "last_frames", last_frames=3)
    FrameQueue([stream]).advance(6.0)
    stream.ask("What happens?")
    once = stream.flops
    stream.ask("And now?")
    assert stream.flops == 2 * once
    with engine.open(clip, method="full", until_seconds=3.0) as same:  # three frames from the start
        same.watch()
        lengths = [span.length for span in same.state.spans]
        assert stream.tokens == same.state.tokens
    assert once == sum(step_flops(widths(), lengths))
    stream.close()
    assert stream.flops == 2 * once


def test_a_closed_stream_holds_nothing(clip: Path) -> None:
    stream = stream_of(clip, "full")
    FrameQueue([stream]).advance(None)
    assert stream.session.state.nbytes["detailed"] > 0
    stream.close()
    assert stream.session.state.nbytes["detailed"] == 0
