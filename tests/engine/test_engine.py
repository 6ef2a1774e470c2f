"""The front door: a model loaded once, streams opened on it."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

import statekv
from statekv.config import Config
from statekv.engine.engine import Engine
from statekv.errors import ConfigError, HorizonError, StateKVError, VideoError, VideoWarning
from statekv.video.writer import write_video
from tests.talk import (
    QUESTION,
    adapted,
    assert_same_answer,
    assert_same_stream,
    inputs_of,
    session_answer,
    some_frames,
    stock_answer,
)
from tests.tiny import TWO_FAMILIES, tiny, video

EVERY_FAMILY = pytest.mark.parametrize("family", TWO_FAMILIES)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    write_video(tmp_path / "clip.mp4", video(12), fps=2)
    return tmp_path / "clip.mp4"


def engine(family: str = "internvl", trained: int = 4096, **settings: Any) -> Engine:
    return Engine(adapted(tiny(family, max_position_embeddings=trained)), Config(max_new_tokens=6, **settings))


@EVERY_FAMILY
def test_from_a_saved_folder_to_an_answer(family: str, clip: Path, tmp_path: Path) -> None:
    folder = tiny(family).save(tmp_path / "checkpoint")
    loaded = statekv.load(str(folder), budget=20, max_new_tokens=6)
    assert loaded.config == Config(budget=20, max_new_tokens=6)
    session = loaded.open(str(clip))
    session.watch()
    assert session.frames == 6
    direct = engine(family, budget=20)
    other = direct.open(clip)
    other.watch()
    assert session.ask(QUESTION) == other.ask(QUESTION) != ""


@EVERY_FAMILY
def test_a_session_works_on_when_nobody_holds_its_engine(family: str) -> None:
    held = engine(family, budget=20)
    expected, session = held.open(), engine(family, budget=20).open()
    gc.collect()
    for stream in (expected, session):
        stream.push(some_frames(6))
    assert_same_stream(session, expected)
    assert session.ask(QUESTION) == expected.ask(QUESTION)


@EVERY_FAMILY
def test_a_folder_given_as_a_path_loads(family: str, tmp_path: Path) -> None:
    folder = tiny(family).save(tmp_path / "checkpoint")
    session = statekv.load(folder).open()  # type: ignore[arg-type]
    session.push(some_frames(2))
    assert session.ask(QUESTION, max_new_tokens=1)


def test_settings_go_from_load_to_open() -> None:
    opened = engine(budget=20, fps=3.0).open(method="streaming_llm", budget=30, sinks=2).state.config
    assert (opened.carry, opened.recall, opened.budget, opened.sinks, opened.fps) == (
        "sink_recent",
        "sink_recent",
        30,
        2,
        3.0,
    )


def test_what_means_nothing_with_the_source_is_refused_where_it_is_given(clip: Path) -> None:
    """The engine's own settings are those of all its sessions, whatever they watch."""
    loaded = engine(max_lag_seconds=5.0, fps=2.0, retrieve=9, recall="retrieve")
    assert loaded.open(clip).state.config.max_lag_seconds == 5.0
    assert loaded.open().state.config.fps == 2.0
    assert loaded.open(clip, method="full").state.config == Config.of(
        "full", max_lag_seconds=5.0, fps=2.0, max_new_tokens=6
    )
    assert loaded.open(clip, realtime=True, max_lag_seconds=3.0).state.config.max_lag_seconds == 3.0
    for source, setting, told in (
        (clip, {"max_lag_seconds": 3.0}, "max_lag_seconds is 3.0 with a file, but means something only with a"),
        (None, {"fps": 3.0}, "fps is 3.0 with pushed frames"),
        (iter(some_frames(1)), {"prefetch": 2}, "prefetch is 2 with pushed frames"),
        (clip, {"method": "full", "budget": 9}, "budget is 9 with carry 'all'"),
    ):
        with pytest.raises(ConfigError, match=told):
            loaded.open(source, **setting)  # type: ignore[arg-type]


def test_none_is_a_value_where_the_setting_says_so(clip: Path) -> None:
    session = engine().open(clip, fps=None)
    session.watch()
    assert session.frames == 12


@pytest.mark.parametrize(
    ("arguments", "told"),
    [({"method": "best"}, "best"), ({"bugdet": 3}, "bugdet"), ({"budget": 0}, "budget"), ({"fps": -1.0}, "fps")],
)
def test_a_wrong_setting_is_named(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        engine().open(**arguments)


def test_a_source_that_is_not_there_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"nothing\.mp4"):
        engine().open(tmp_path / "nothing.mp4")
    (tmp_path / "notes.mp4").write_text("no video")
    with pytest.raises(VideoError, match=r"notes\.mp4"):
        engine().open(tmp_path / "notes.mp4")


def test_a_stream_that_is_not_there_is_refused_at_once(clip: Path) -> None:
    with pytest.raises(ConfigError, match="stream is 4"):
        engine().open(clip, stream=4)


@EVERY_FAMILY
@pytest.mark.parametrize("layout", ["hf", "release"])
def test_a_files_horizon_holds_all_of_it_and_a_long_question(family: str, layout: str, clip: Path) -> None:
    session = engine(family, trained=32 if family == "internvl" else 4096).open(clip, layout=layout)
    session.watch()
    horizon, seen = session.state.horizon, session.state.position
    if family == "internvl":
        assert horizon <= seen + 512 + 6 + 20
    else:
        assert horizon == 4096
    assert session.frames == 6
    assert session.ask("What is it? " * 60)


@EVERY_FAMILY
def test_files_end_at_their_horizon_and_streams_of_unknown_length_compact(family: str, clip: Path) -> None:
    loaded = engine(family)
    assert not loaded.open(clip).state.compacts
    assert loaded.open().state.compacts
    assert loaded.open(clip, on_horizon="compact").state.compacts
    assert not loaded.open(on_horizon="error").state.compacts


def test_a_file_too_long_for_the_model_compacts_and_is_told(clip: Path) -> None:
    loaded = engine("qwen3_vl", trained=100)
    with pytest.warns(VideoWarning, match=r"12 frames need up to \d+ positions.*: older steps move closer together"):
        session = loaded.open(clip, fps=None)
    told = loaded.open(clip, fps=None, on_horizon="compact")
    for each in (session, told):
        each.watch()
    assert session.state.compaction.factor > 1
    assert_same_stream(session, told)
    with pytest.raises(HorizonError, match="the model was trained for 100"):
        loaded.open(clip, fps=None, on_horizon="error")


@EVERY_FAMILY
def test_a_file_that_compacts_needs_no_more_positions_than_were_trained(family: str, clip: Path) -> None:
    session = engine(family, trained=100).open(clip, on_horizon="compact", fps=None)
    session.watch()
    assert (session.frames, session.state.horizon) == (12, 100)
    assert session.ask(QUESTION)


@pytest.mark.parametrize("settings", [{}, {"max_frames": 4}, {"method": "uniform", "max_frames": 2}])
@EVERY_FAMILY
def test_until_a_time_it_is_the_video_cut_there(
    family: str, settings: dict[str, Any], clip: Path, tmp_path: Path
) -> None:
    write_video(tmp_path / "short.mp4", video(12)[:7], fps=2)
    loaded = engine(family, trained=128 if family == "internvl" else 4096)  # whose positions are scaled to the length
    long = loaded.open(clip, until_seconds=3.5, **settings)
    short = loaded.open(tmp_path / "short.mp4", **settings)
    for session in (long, short):
        session.watch()
    assert long.frames == long.state.frames_expected == short.frames
    assert (long.state.horizon, long.state.spans) == (short.state.horizon, short.state.spans)


@EVERY_FAMILY
def test_frames_expected_are_the_frames_that_come(family: str, clip: Path) -> None:
    for settings in ({}, {"fps": 0.5}, {"max_frames": 4}, {"fps": 2.0}):
        session = engine(family).open(clip, **settings)
        session.watch()
        assert session.frames == session.state.frames_expected


@EVERY_FAMILY
def test_close_hands_the_attention_back(family: str) -> None:
    made, fresh = tiny(family), tiny(family)
    opened = Engine(adapted(made), Config())
    opened.open().push(some_frames(2))
    assert made.config.text_config._attn_implementation == "statekv"
    assert made.config.vision_config._attn_implementation == fresh.config.vision_config._attn_implementation
    inputs = inputs_of(fresh, video(3), QUESTION)
    with pytest.raises(StateKVError, match="belongs to statekv"):
        stock_answer(made, inputs)
    opened.close()
    opened.close()
    assert made.config.text_config._attn_implementation == fresh.config.text_config._attn_implementation
    assert_same_answer(stock_answer(made, inputs), stock_answer(fresh, inputs))


@EVERY_FAMILY
@pytest.mark.parametrize("way", ["close", "set_attn_implementation"])
def test_a_session_whose_engine_lost_the_attention_takes_it_again(family: str, way: str) -> None:
    """Never a silent answer from transformers' own attention, which would mask by cache lengths."""
    opened = engine(family, budget=20)
    session, other = opened.open(), engine(family, budget=20).open()
    for stream in (session, other):
        stream.push(some_frames(6))
    if way == "close":
        opened.close()
    else:
        opened.model.model.set_attn_implementation("sdpa")
    assert torch.equal(session.logits(QUESTION), other.logits(QUESTION))
    assert session.ask(QUESTION) == other.ask(QUESTION)
    for stream in (session, other):
        stream.push(some_frames(2))
    assert torch.equal(session.logits(QUESTION), other.logits(QUESTION))


@EVERY_FAMILY
def test_generate_on_an_engines_model_leaves_the_engine_working(family: str) -> None:
    opened = engine(family, budget=20)
    made = tiny(family)
    session = opened.open()
    session.push(some_frames(4))
    before = session_answer(session)
    inputs = inputs_of(made, video(3), QUESTION)
    found = statekv.generate(opened.model.model, **inputs, budget=20, max_new_tokens=4)
    expected = statekv.generate(made.model, **inputs, budget=20, max_new_tokens=4)
    assert found.tolist() == expected.tolist()  # type: ignore[union-attr]
    after = session_answer(session)
    assert after.tokens == before.tokens


@EVERY_FAMILY
def test_two_engines_on_one_model(family: str) -> None:
    made = tiny(family)
    one, two = Engine(adapted(made), Config(budget=20)), Engine(adapted(made), Config(budget=20))
    session = two.open()
    session.push(some_frames(4))
    expected = session.ask(QUESTION, max_new_tokens=4)
    one.close()
    assert session.ask(QUESTION, max_new_tokens=4) == expected
    two.close()
    assert made.config.text_config._attn_implementation == tiny(family).config.text_config._attn_implementation
