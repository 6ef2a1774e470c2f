"""What is told before a run: frames, pixels, figures, memory and time; and what does not fit is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from statekv.config import Config
from statekv.errors import MemoryLimitError
from statekv.evals.paper import plan
from statekv.evals.paper.check import Clip, DataCheck, WeightsCheck
from statekv.evals.paper.estimate import trial
from statekv.evals.paper.plan import (
    Part,
    check_memory,
    check_weights_fit,
    clock,
    data_told,
    faults_told,
    plan_told,
    weights_told,
)
from statekv.evals.task import EvalVideo
from statekv.evals.tasks.ovo import OVORealtime
from statekv.models.checkpoint import Weights
from tests.evals.small import question, write_clips
from tests.talk import shared_engine

SETTINGS = {**OVORealtime.settings, "max_new_tokens": 2}
CONFIGS = {name: Config.of(name, **SETTINGS) for name in ("full", "recency_window", "statekv_weighted")}


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Part:
    (path,) = write_clips(tmp_path_factory.mktemp("clips"), 1)
    clips = [Clip(EvalVideo(name, path, (question(name),)), n, 11.0, 56, 40) for name, n in (("a", 11), ("b", 400))]
    found = DataCheck(OVORealtime(path.parent), clips)
    return Part(found, clips[:1], trial(shared_engine("internvl"), clips[0], CONFIGS))


def test_everything_is_told(part: Part) -> None:
    told = dict(plan_told([part], shards=2))
    assert list(told) == ["frames", "figure", "positions", "methods", "memory", "time"]
    assert told["frames"] == (
        "ovo_realtime: at most 1 a second and 512 of a video: 11 … 400, 411 in all; of 56 x 40 pixels, seen as 32 x 32"
    )
    assert "the mean of the sub-tasks stands beside the paper's" in told["figure"]
    assert "RoPE is scaled for it" in told["positions"]
    step = part.trial.words + part.trial.patches
    assert told["methods"] == (
        f'full, recency_window (the release\'s "ReKV (R = 16)"; here {4096 / step:.3g} steps of {step} tokens), '
        "statekv_weighted"
    )
    assert "3 x " in told["memory"]
    assert told["time"].endswith("for videos that are not done yet, 1 of 2 of ovo_realtime, this process of 2")


def test_weights_are_told_with_what_they_are_compared_with() -> None:
    weights = Weights(4, {"bfloat16": 7_940_000_000})
    named = WeightsCheck("/models/InternVL3-8B-hf", "internvl", "internvl3-8b", weights)
    sizes = "internvl, the sizes of internvl3-8b"
    assert weights_told(named) == f"{sizes}; 7.94 B parameters in 4 files, bfloat16"
    alone = " (whose figures stand beside those of a folder of its name alone); 7.94 B"
    assert weights_told(replace(named, name="/models/tuned")).startswith(sizes + alone)
    assert weights_told(replace(named, known=None)).startswith("internvl, none of the paper's models; 7.94 B")


def test_short_videos_need_no_word_about_positions(part: Part) -> None:
    short = replace(part, found=replace(part.found, clips=part.found.clips[:1]))
    assert "positions" not in dict(plan_told([short], shards=1))


def test_missing_videos_are_counted_and_one_is_named(part: Part) -> None:
    found, folder = part.found, Path("ovo")
    assert faults_told(found) == ""
    assert data_told(found, folder).endswith("2 questions on 2 videos; 0 videos missing, 0 records or videos of no use")
    lost = replace(found, missing=[Path("ovo/c.mp4"), Path("ovo/d.mp4")], faulty={"line 3": "is not JSON"})
    assert faults_told(lost) == "ovo_realtime: ovo/c.mp4 is not there, and 2 more"
    assert data_told(lost, folder).endswith("2 videos missing, 1 records or videos of no use")


def test_caches_that_do_not_fit_are_refused(part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "room", lambda engine: part.cache_bytes)
    check_memory([part])
    monkeypatch.setattr(plan, "room", lambda engine: part.cache_bytes - 1)
    with pytest.raises(MemoryLimitError, match=r"the caches of the longest video take .*one --method at a time"):
        check_memory([part])


@pytest.mark.parametrize(("loading", "each"), [({}, 4), ({"dtype": "bfloat16"}, 2), ({"dtype": "float32"}, 4)])
def test_weights_that_do_not_fit_are_refused_before_they_are_loaded(
    loading: dict[str, str], each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU they are loaded in float32 unless told otherwise."""
    found = WeightsCheck("big", "internvl", None, Weights(4, {"float32": 1, "bfloat16": 999}))
    room = 2 * 1000 * each  # more than what must stay free
    monkeypatch.setattr("statekv.runner.memory.free_bytes", lambda device: room)
    check_weights_fit(found, {"device": "cpu", **loading})
    room = 1000 * each
    with pytest.raises(MemoryLimitError, match="big would take"):
        check_weights_fit(found, {"device": "cpu", **loading})
    check_weights_fit(found, {"device_map": "auto", **loading})


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.2, "1 s"), (99, "99 s"), (100, "2 min"), (5940, "99 min"), (12_120, "3 h 22 min")]
)
def test_times_are_told_roughly(seconds: float, told: str) -> None:
    assert clock(seconds) == told
