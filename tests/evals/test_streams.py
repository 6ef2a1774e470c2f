"""What a stream costs, and that it lets go of its memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from statekv.config import Config
from statekv.evals.streams import Feed, Stream
from statekv.models.flops import Widths, step_flops
from tests.evals.small import SETTINGS, write_clips
from tests.talk import shared_engine


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"), 1)[0]


def stream_of(clip: Path, method: str, **settings: object) -> Stream:
    return Stream(shared_engine("internvl"), clip, Config.of(method, **SETTINGS, **settings))


def widths() -> Widths:
    return Widths.of(shared_engine("internvl").model.text_config)


@pytest.mark.parametrize(
    ("method", "budget", "products"),
    [("full", None, 2), ("random", 40, 2), ("recency_window", 40, 2), ("statekv", 40, 3), ("statekv_retrieve", 40, 3)],
)
def test_flops_are_those_of_the_steps(clip: Path, method: str, budget: int | None, products: int) -> None:
    stream = stream_of(clip, method, budget=budget or 4096)
    Feed([stream]).advance(None)
    lengths = [span.length for span in stream.session.state.spans]
    stream.ask("What happens?")
    stream.close()
    assert len(lengths) == 12  # the prefix and eleven frames
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
    Feed([stream]).advance(6.0)
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
    Feed([stream]).advance(None)
    assert stream.session.state.nbytes["detailed"] > 0
    stream.close()
    assert stream.session.state.nbytes["detailed"] == 0
