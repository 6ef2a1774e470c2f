"""What is left of a session after a step failed or Ctrl-C was pressed."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from statekv.engine.progress import Progress
from statekv.engine.session import Session
from statekv.errors import MemoryLimitError, StateKVError
from statekv.video.frame import Frame
from statekv.video.writer import write_video
from tests.talk import (
    QUESTION,
    UNLIMITED,
    assert_same_stream,
    frames_of,
    session_answer,
    shared_engine,
    some_frames,
)
from tests.tiny import TWO_FAMILIES, video

EVERY_FAMILY = pytest.mark.parametrize("family", TWO_FAMILIES)
NO_MEMORY = "[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: 8 bytes"


@contextmanager
def failing(module: Any, error: type[Exception], text: str = "") -> Iterator[None]:
    def fail(*_: Any) -> None:
        raise error(text)

    hook = module.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def interrupting(module: Any) -> Iterator[None]:
    """Ctrl-C whenever a module runs."""
    hook = module.register_forward_pre_hook(lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        hook.remove()


@pytest.fixture(autouse=True)
def _ctrl_c_arrives() -> Iterator[None]:
    """Also where the tests run in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def watching(family: str, frames: int = 8, vision_batch: int = 8) -> Session:
    session = shared_engine(family).open(budget=20, vision_batch=vision_batch)
    session.source = iter(some_frames(frames))
    return session


@EVERY_FAMILY
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize(
    ("error", "seen_as"), [(ZeroDivisionError, ZeroDivisionError), (RuntimeError, MemoryLimitError)]
)
def test_after_a_failed_step_what_was_seen_can_be_asked(
    family: str, layer: int, error: type[Exception], seen_as: type[Exception]
) -> None:
    session = shared_engine(family).open(budget=20)
    session.push(some_frames(6))
    before = session_answer(session)
    with failing(session.runner.model.language_model.layers[layer].mlp, error, NO_MEMORY), pytest.raises(seen_as):
        session.push(some_frames(2, seed=7))
    assert session.frames == 6
    after = session_answer(session)
    assert after.tokens == before.tokens
    assert (after.logits == before.logits).all()
    with pytest.raises(StateKVError, match="a step failed") as told:
        session.push(some_frames(2))
    assert "new session" in told.value.hint
    assert session_answer(session).tokens == before.tokens


@EVERY_FAMILY
def test_out_of_memory_in_the_vision_tower_is_told_as_such(family: str) -> None:
    session = shared_engine(family).open(budget=20)
    session.push(some_frames(4))
    expected = session.ask(QUESTION)
    model = session.runner.model.model.model
    tower = getattr(model, "visual", None) or model.vision_tower
    with failing(tower, RuntimeError, NO_MEMORY), pytest.raises(MemoryLimitError):
        session.push(some_frames(2))
    assert session.ask(QUESTION) == expected


@EVERY_FAMILY
def test_out_of_memory_while_a_cache_grows_is_told_as_such(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    session = shared_engine(family).open(budget=200)
    session.push(some_frames(2))
    expected = session.ask(QUESTION)

    def refuse(*_: Any) -> None:
        raise RuntimeError(NO_MEMORY)

    monkeypatch.setattr(session.state.carried, "allocate", refuse)
    with pytest.raises(MemoryLimitError):
        session.push(some_frames(30))
    monkeypatch.undo()
    assert session.ask(QUESTION)
    if session.frames == 2:
        assert session.ask(QUESTION) == expected


@EVERY_FAMILY
def test_a_first_step_that_fails_leaves_nothing_seen(family: str) -> None:
    session = shared_engine(family).open(budget=20)
    layers = session.runner.model.language_model.layers
    with failing(layers[1], ZeroDivisionError), pytest.raises(ZeroDivisionError):
        session.push(some_frames(2))
    assert (session.state.tokens, session.state.position, session.state.spans) == (0, 0, [])
    with pytest.raises(StateKVError):
        session.ask(QUESTION)


@EVERY_FAMILY
def test_other_sessions_go_on_after_one_failed(family: str) -> None:
    engine = shared_engine(family)
    broken, whole, alone = (engine.open(budget=20) for _ in range(3))
    whole.push(some_frames(4))
    with failing(engine.model.language_model.layers[1], ZeroDivisionError), pytest.raises(ZeroDivisionError):
        broken.push(some_frames(2))
    whole.push(some_frames(4, seed=1))
    alone.push(some_frames(4))
    alone.push(some_frames(4, seed=1))
    assert_same_stream(whole, alone)


@EVERY_FAMILY
def test_a_failing_on_step_leaves_a_whole_stream(family: str) -> None:
    def fail(_: Progress) -> None:
        raise ZeroDivisionError

    session, other = watching(family), watching(family)
    with pytest.raises(ZeroDivisionError):
        session.watch(on_step=fail)
    session.ask(QUESTION)
    session.watch()
    other.watch()
    assert_same_stream(session, other)


@EVERY_FAMILY
@pytest.mark.parametrize("where", ["on_step", "vision", "first layer", "last layer"])
def test_ctrl_c_stops_between_steps_and_watching_can_go_on(family: str, where: str) -> None:
    session, other = watching(family, vision_batch=1), watching(family, vision_batch=1)
    language_model = session.runner.model.language_model
    model = session.runner.model.model.model
    modules = {
        "vision": getattr(model, "visual", None) or model.vision_tower,
        "first layer": language_model.layers[0],
        "last layer": language_model.layers[-1],
    }
    session.watch(until_seconds=1)
    if where == "on_step":
        with pytest.raises(KeyboardInterrupt):
            session.watch(on_step=lambda _: signal.raise_signal(signal.SIGINT))
    else:
        with interrupting(modules[where]), pytest.raises(KeyboardInterrupt):
            session.watch()
    assert session.frames == (2 if where == "vision" else 2 + session.runner.model.frames_per_step)
    assert session.ask(QUESTION)
    session.watch()
    other.watch()
    assert_same_stream(session, other)
    assert session.ask(QUESTION) == other.ask(QUESTION)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@EVERY_FAMILY
def test_ctrl_c_while_a_frame_is_decoded_never_passes_for_the_end_of_the_video(family: str) -> None:
    """Either watching goes on where it stopped, or it says that it cannot."""
    frames = some_frames(8)

    def source() -> Iterator[Frame]:
        for index, frame in enumerate(frames):
            if index == 3:
                signal.raise_signal(signal.SIGINT)
            yield frame

    session, other = watching(family, vision_batch=1), watching(family, vision_batch=1)
    session.source = source()
    with pytest.raises(KeyboardInterrupt):
        session.watch()
    assert session.ask(QUESTION)
    try:
        session.watch()
    except StateKVError:
        return
    other.watch()
    assert_same_stream(session, other)


@EVERY_FAMILY
def test_ctrl_c_on_a_real_file(family: str, tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", video(8), fps=1)
    session, other = (shared_engine(family).open(tmp_path / "clip.mp4", budget=20) for _ in range(2))
    with interrupting(session.runner.model.language_model.layers[1]), pytest.raises(KeyboardInterrupt):
        session.watch()
    assert session.ask(QUESTION)
    session.watch()
    other.watch()
    assert_same_stream(session, other)
    session.close()
    other.close()


@EVERY_FAMILY
def test_ctrl_c_in_an_answer_leaves_the_stream_whole(family: str) -> None:
    session, other = shared_engine(family).open(budget=20), shared_engine(family).open(budget=20)
    for stream in (session, other):
        stream.push(some_frames(5))
    with interrupting(session.runner.model.language_model.layers[1]), pytest.raises(KeyboardInterrupt):
        session.ask(QUESTION)
    assert_same_stream(session, other)
    assert session.ask(QUESTION) == other.ask(QUESTION)


def test_a_size_that_changes_between_steps_is_fine_for_internvl() -> None:
    session = shared_engine("internvl").open(**UNLIMITED)
    session.push([*frames_of(video(2)), *frames_of(video(2, height=64, width=64))])
    assert session.frames == 4
    assert torch.isfinite(session.logits(QUESTION)).all()


def test_what_is_no_frame_is_refused_by_name() -> None:
    session = shared_engine("internvl").open()
    for wrong in (video(1)[0], None, "clip.mp4"):
        with pytest.raises(StateKVError):
            session.push([wrong])  # type: ignore[list-item]
    session.push(some_frames(1))
    assert session.ask(QUESTION)
