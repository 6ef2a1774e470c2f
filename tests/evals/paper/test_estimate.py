"""What a run will take: counted tokens and bytes are what comes, and time follows from what a trial has taken."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from statekv.config import Config
from statekv.evals.paper.check import Clip, DataCheck, check_data
from statekv.evals.paper.estimate import Trial, trial, weight_bytes
from statekv.evals.task import EvalVideo
from tests.evals.data_sets import videomme, write_lines
from tests.evals.small import write_clips
from tests.talk import shared_engine
from tests.tiny import TWO_FAMILIES

SETTINGS = {"fps": 2.0, "max_frames": 512, "max_new_tokens": 4}
CONFIGS = {
    "full": Config.of("full", **SETTINGS),
    "recency_window-30": Config.of("recency_window", budget=30, **SETTINGS),
    "statekv-30": Config.of("statekv", budget=30, **SETTINGS),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataCheck:
    """Two videos of 22 frames at two a second, and three questions."""
    folder = tmp_path_factory.mktemp("data")
    write_clips(folder, 2)
    write_lines(folder / "test.jsonl", [videomme(number, name) for number, name in enumerate("001")])
    found = check_data(folder)
    found.clips = [replace(clip, frames=22) for clip in found.clips]  # two a second
    return found


@pytest.fixture(scope="module", params=TWO_FAMILIES)
def tried(request: pytest.FixtureRequest, data: DataCheck) -> Trial:
    return trial(shared_engine(request.param), data.longest, CONFIGS)


def test_tokens_are_those_of_the_whole_video(tried: Trial, data: DataCheck) -> None:
    with tried.engine.open(data.longest.video.path, **CONFIGS["full"].opening) as session:
        session.watch()
        assert session.frames == 22
        lengths = [span.length for span in session.state.spans]
        words = abs(sum(tried.lengths(data.longest)) - sum(lengths))
        assert words <= len(lengths)  # a frame's number or time may take a token more later on
        assert len(tried.lengths(data.longest)) == session.steps
        reserved = session.state.nbytes["detailed"]
        assert tried.detailed(data.longest)["full"] == pytest.approx(reserved, rel=0.1)
        assert tried.positions(data.longest) >= session.state.position


def test_carried_caches_count_in_full(tried: Trial) -> None:
    token = tried.engine.model.kv_spec().bytes_per_token
    assert tried.costs["full"].carried == 0
    for name in ("recency_window-30", "statekv-30"):
        assert tried.costs[name].carried >= 30 * token
    assert tried.carried == sum(cost.carried for cost in tried.costs.values())


def test_weights_are_weighed_as_they_are_loaded(tried: Trial) -> None:
    model = tried.engine.model.model
    assert weight_bytes(tried.engine) == 4 * sum(weight.numel() for weight in model.parameters())


def test_the_trial_leaves_nothing_behind(tried: Trial) -> None:
    assert all(cost.stream.session.closed for cost in tried.costs.values())
    assert all(cost.step_seconds > 0 and cost.answer_seconds > 0 for cost in tried.costs.values())
    assert tried.decode_seconds > 0
    assert tried.vision_seconds > 0


def known(tried: Trial, **seconds: float) -> Trial:
    """A trial that took these seconds: for a second of video, a frame, a step, an answer; 0 where it is not said."""
    decode, vision, step, answer = (seconds.get(name, 0.0) for name in ("decode", "vision", "step", "answer"))
    costs = {name: replace(cost, step_seconds=step, answer_seconds=answer) for name, cost in tried.costs.items()}
    return replace(tried, costs=costs, decode_seconds=decode, vision_seconds=vision)


def test_time_is_that_of_reading_seeing_and_answering(tried: Trial, data: DataCheck) -> None:
    first, second = data.clips
    assert known(tried, decode=3.0).seconds([first]) == pytest.approx(3 * 11)
    assert known(tried, vision=0.5).seconds([first, second]) == pytest.approx(0.5 * 44)
    assert known(tried, answer=2.0).seconds([first, second]) == pytest.approx(3 * 2 * 3)
    assert known(tried, decode=1.0, vision=1.0, step=1.0, answer=1.0).seconds([]) == 0


def test_a_step_s_time_grows_with_its_products(tried: Trial, data: DataCheck) -> None:
    """A bounded method's steps cost alike, those of full attention ever more."""
    short, long = (replace(data.longest, frames=frames) for frames in (2000, 4000))
    for name, least, most in (("full", 2.1, 4.0), ("recency_window-30", 1.99, 2.01), ("statekv-30", 1.99, 2.01)):
        alone = replace(known(tried, step=1.0), costs={name: known(tried, step=1.0).costs[name]})
        assert least < alone.seconds([long]) / alone.seconds([short]) < most


def test_larger_pictures_take_more_where_the_model_sees_more(tried: Trial, data: DataCheck) -> None:
    larger = replace(data.longest, width=4 * data.longest.width, height=4 * data.longest.height, frames=4)
    mine, theirs = tried.pixels(data.longest), tried.pixels(larger)
    grows = tried.engine.model.frames_per_step == 2  # the square families have one size
    assert (theirs > mine) == grows
    assert tried.share(larger) == theirs[0] * theirs[1] / (mine[0] * mine[1])
    assert (tried.lengths(larger)[-1] > tried.lengths(data.longest)[-1]) == grows


def test_a_video_of_one_frame_can_be_tried(data: DataCheck, tmp_path: Path) -> None:
    first = data.clips[0]
    cut = Clip(EvalVideo("v", first.video.path, first.video.questions, 0.4), 1, 0.4, first.width, first.height)
    for family in TWO_FAMILIES:
        tried = trial(shared_engine(family), cut, {"full": CONFIGS["full"]})
        assert len(tried.lengths(cut)) == 1
        assert tried.seconds([cut]) > 0
