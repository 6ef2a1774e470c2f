"""Baselines that choose frames: the newest alone, encoded anew for each question, and some spread over the video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import statekv
from statekv.config import Config
from statekv.engine.progress import Progress
from statekv.engine.session import Session
from statekv.errors import ConfigError
from statekv.video.writer import write_video
from tests.talk import (
    QUESTION,
    assert_same_answer,
    assert_same_stream,
    inputs_of,
    session_answer,
    shared_engine,
    some_frames,
    stock_answer,
    stock_model,
)
from tests.tiny import FAMILIES, TWO_FAMILIES, video

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
BOTH_STEPS = pytest.mark.parametrize("family", TWO_FAMILIES)  # one frame to a step, and two


def clip_of(family: str, start: int, stop: int) -> Session:
    """A stream of full attention that has seen nothing but these frames, and knows how many they are."""
    engine = shared_engine(family)
    config = Config.of("full", max_new_tokens=6)
    session = Session(engine.runner, engine.runner.open(config, frames_expected=stop - start))
    session.push(some_frames(12)[start:stop])
    return session


@pytest.mark.parametrize(("seen", "shown"), [(2, 4), (4, 4), (9, 4), (10, 3), (7, 1)])
@EVERY_FAMILY
def test_last_frames_are_a_clip_of_their_own(family: str, seen: int, shown: int) -> None:
    session = shared_engine(family).open(method="last_frames", last_frames=shown)
    session.push(some_frames(12)[:seen])
    expected = clip_of(family, max(0, seen - shown), seen)
    assert_same_answer(session_answer(session), session_answer(expected))


def test_last_frames_are_what_the_stock_model_sees_of_them() -> None:
    made = stock_model("internvl")
    session = shared_engine("internvl").open(method="last_frames")
    session.push(some_frames(12))
    assert_same_answer(session_answer(session), stock_answer(made, inputs_of(made, video(12)[-4:], QUESTION)))


@BOTH_STEPS
def test_nothing_enters_and_asking_changes_nothing(family: str) -> None:
    asked, never = (shared_engine(family).open(method="last_frames") for _ in range(2))
    told: list[Progress] = []
    for number, frame in enumerate(some_frames(12), start=1):
        asked.push([frame], told.append)
        never.push([frame])
        assert asked.frames == number
        first = session_answer(asked)
        assert torch.equal(session_answer(asked).logits, first.logits)
        assert (asked.state.tokens, asked.state.position, asked.state.spans) == (0, 0, [])
        assert asked.frames == number
    assert_same_stream(asked, never)
    assert_same_answer(session_answer(asked), session_answer(never))
    per_step = asked.runner.model.frames_per_step
    assert [progress.frames for progress in told] == list(range(per_step, 13, per_step))
    assert asked.steps == 12 // per_step


@BOTH_STEPS
def test_memory_does_not_grow_with_the_video(family: str) -> None:
    session, held = shared_engine(family).open(method="last_frames"), []
    for frame in some_frames(20):
        session.push([frame])
        session.ask(QUESTION, max_new_tokens=2)
        held.append(session.state.nbytes)
    assert all(nbytes == held[4] for nbytes in held[4:])


@EVERY_FAMILY
def test_a_file_is_sized_by_the_frames_that_are_shown(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by its length: neither RoPE nor pictures, and the vision tower looks at no other frame."""
    write_video(tmp_path / "clip.mp4", video(40), fps=1)
    looked: list[int] = []
    engine = shared_engine(family, 64 if family == "internvl" else 4096)
    original = engine.model.encode

    def look(steps: Any, *arguments: Any) -> Any:
        looked.append(sum(len(step) for step in steps))
        return original(steps, *arguments)

    monkeypatch.setattr(engine.model, "encode", look)
    with engine.open(tmp_path / "clip.mp4", method="last_frames", max_new_tokens=4) as session:
        session.watch()
        assert looked == []
        assert session.frames == 40
        assert session.state.frames_expected == 4
        assert session.state.horizon <= engine.model.trained_length + 700
        assert session.ask(QUESTION)
    assert looked == [4]


@EVERY_FAMILY
def test_uniform_spreads_its_frames_over_the_file(family: str, tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", video(40), fps=1)
    engine = shared_engine(family)
    with (
        engine.open(tmp_path / "clip.mp4", method="uniform", max_frames=8) as session,
        engine.open(tmp_path / "clip.mp4", method="full", max_frames=8) as full,
    ):
        for stream in (session, full):
            stream.watch()
        assert session.frames == 8
        times = [span.pts_seconds for span in session.state.spans if span.pts_seconds is not None]
        assert times[0] == 0
        assert times[-1] >= 30
        assert session.state.config.method == "uniform"
        assert_same_answer(session_answer(session), session_answer(full))


def test_uniform_needs_a_known_length() -> None:
    with pytest.raises(ConfigError, match=r"uniform spreads .*, but the length of this source is unknown") as caught:
        shared_engine("internvl").open(method="uniform")
    assert "last_frames" in caught.value.hint
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["last_frames", "uniform"])
def test_generate_has_no_frames_to_choose_from(method: str) -> None:
    made = stock_model("internvl")
    inputs = inputs_of(made, video(3), QUESTION)
    with pytest.raises(ConfigError, match=f"^{method} chooses among the frames of a video"):
        statekv.generate(made.model, method=method, **inputs, max_new_tokens=2)


@pytest.mark.parametrize(
    ("family", "method"), [*((family, "rekv") for family in FAMILIES), ("internvl", "statekv_retrieve")]
)
def test_generate_retrieves(family: str, method: str) -> None:
    made = stock_model(family)
    inputs = inputs_of(made, video(8), QUESTION)
    settings: dict[str, Any] = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    every = statekv.generate(made.model, method="full", **inputs, **settings)
    found = statekv.generate(made.model, method=method, **inputs, **settings)
    fewer = statekv.generate(made.model, method=method, retrieve=1, **inputs, **settings)
    assert torch.equal(found.sequences, every.sequences)  # type: ignore[union-attr]
    assert not torch.allclose(fewer.logits[0], every.logits[0], atol=1e-3)  # type: ignore[union-attr,index]
