"""A session that is saved, restored and goes on equals one that was never interrupted, bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from statekv.config import Config
from statekv.engine.engine import Engine
from statekv.engine.session import Session
from statekv.errors import ConfigError, ModelError, SaveError, StateKVError, VideoError
from statekv.video.file import probe
from statekv.video.writer import write_video
from tests.presets import chosen, preset
from tests.talk import (
    QUESTION,
    adapted,
    assert_same_memory,
    assert_same_stream,
    memory,
    shared_engine,
    some_frames,
)
from tests.tiny import EVERY_MODEL, TWO_FAMILIES, tiny, video
from tests.video.fixtures.clips import write_clip

FRAMES = 10
SETTINGS = {
    **chosen("attention", "random", "rekv", "streaming_llm", "all", "last_frames", "far", budget=30),
    "every dial": preset("every dial", budget=60),
}


def with_every_model(*names: str) -> pytest.MarkDecorator:
    """The first of some settings with every model, the others with two."""
    first, *others = names
    both = [(family, name) for family in TWO_FAMILIES for name in others]
    return pytest.mark.parametrize(("family", "name"), [*((family, first) for family in EVERY_MODEL), *both])


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saving") / "clip.mp4"
    write_video(path, video(2 * FRAMES), fps=2)
    return path


def assert_same_session(found: Session, expected: Session) -> None:
    """All that either will ever compute: memories, slot order included, frames in waiting, and what comes of it."""
    assert_same_stream(found, expected)
    a, b = found.state, expected.state
    for field in (each for each in dataclasses.fields(a) if each.compare):  # what is the model's is not the stream's
        assert getattr(a, field.name) == getattr(b, field.name), field.name
    if a.config.carry != "all":
        for layer, length in enumerate(b.carried.lengths):
            assert a.carried.lengths[layer] == length
            token_ids = [state.carried.token_ids[layer][..., :length] for state in (a, b)]  # type: ignore[union-attr]
            assert torch.equal(*token_ids)
    assert found.steps == expected.steps
    assert len(found.queue.waiting) == len(expected.queue.waiting)
    if found.frames:
        assert torch.equal(found.logits(QUESTION), expected.logits(QUESTION))
        assert found.ask(QUESTION) == expected.ask(QUESTION)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *((family, "attention") for family in EVERY_MODEL),
        *(("qwen3_vl", name) for name in SETTINGS if name != "attention"),
        *(("internvl", name) for name in ("random", "far", "last_frames")),
    ],
)
def test_pushed_frames(family: str, name: str, tmp_path: Path) -> None:
    """Interrupted after an odd frame, which waits for its partner in Qwen's families."""
    engine, frames = shared_engine(family), some_frames(FRAMES)
    going, never = (engine.open(**SETTINGS[name]) for _ in range(2))
    never.push(frames)
    going.push(frames[:7])
    going.save(tmp_path / "saved")
    going.close()
    restored = engine.restore(tmp_path / "saved")
    restored.push(frames[7:])
    assert_same_session(restored, never)


@with_every_model("attention", "rekv", "last_frames")
def test_a_file(family: str, name: str, clip: Path, tmp_path: Path) -> None:
    """Interrupted in the middle of a batch: pictures that the vision tower has seen are not shown to it again."""
    engine, settings = shared_engine(family), {**SETTINGS[name], "vision_batch": 3}
    never, going = (engine.open(clip, **settings) for _ in range(2))
    never.watch(until_seconds=5)
    never.watch()
    going.watch(until_seconds=5)
    going.save(tmp_path / "saved")
    going.close()
    restored = engine.restore(tmp_path / "saved")
    assert restored.frames == 6
    restored.watch()
    assert restored.frames == FRAMES
    assert_same_session(restored, never)


@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_saved_and_restored_after_each_frame(family: str, clip: Path, tmp_path: Path) -> None:
    engine = shared_engine(family)
    never, going = (engine.open(clip, budget=30, vision_batch=4) for _ in range(2))
    never.watch()
    for seconds in range(FRAMES):
        going.watch(until_seconds=seconds)
        assert going.frames == seconds + 1
        going.ask(QUESTION, max_new_tokens=2)
        going.save(tmp_path / "saved")
        going.close()
        going = engine.restore(tmp_path / "saved")
    going.watch()
    assert_same_session(going, never)


def test_an_empty_session(clip: Path, tmp_path: Path) -> None:
    engine = shared_engine("qwen3_vl")
    never, going = engine.open(clip, budget=30), engine.open(clip, budget=30)
    going.save(tmp_path / "saved")
    restored = engine.restore(tmp_path / "saved")
    never.watch()
    restored.watch()
    assert_same_session(restored, never)


def test_saving_leaves_the_session_alone(clip: Path, tmp_path: Path) -> None:
    engine = shared_engine("internvl")
    never, going = engine.open(clip, budget=30), engine.open(clip, budget=30)
    for second in range(4, FRAMES, 3):
        going.watch(until_seconds=second)
        never.watch(until_seconds=second)
        going.save(tmp_path / "saved")
    assert_same_session(going, never)


def test_frames_pushed_between_those_of_a_source(tmp_path: Path, clip: Path) -> None:
    """What the tower saw of steps that did not come about is of no use, but decides what it looks at next."""
    engine = shared_engine("qwen2_5_vl")
    never, going = (engine.open(clip, budget=30, vision_batch=4) for _ in range(2))
    other = some_frames(1, seed=9)[0]
    other = dataclasses.replace(other, data=torch.zeros_like(next(engine.open(clip).source).data))  # type: ignore[arg-type]
    for each in (never, going):
        each.watch(until_seconds=3)
        each.push([other])
    going.save(tmp_path / "saved")
    restored = engine.restore(tmp_path / "saved")
    for each in (never, restored):
        each.watch()
    assert_same_session(restored, never)


def test_frames_read_from_an_iterator_are_not_lost(tmp_path: Path) -> None:
    engine, frames = shared_engine("qwen3_vl"), some_frames(12)
    never, going = engine.open(budget=30), engine.open(budget=30)
    never.source, coming = iter(frames), iter(frames)
    going.source = coming
    for each in (never, going):
        each.watch(until_seconds=4)
    going.save(tmp_path / "saved")
    restored = engine.restore(tmp_path / "saved")
    restored.watch()
    assert restored.frames > 5
    restored.source = coming
    restored.watch()
    assert restored.frames == 12
    never.watch()
    assert_same_memory(memory(restored), memory(never))


def test_an_engine_of_its_own_on_equal_weights(tmp_path: Path) -> None:
    going = fresh_engine("internvl").open(budget=30)
    going.push(some_frames(6))
    going.save(tmp_path / "saved")
    restored = fresh_engine("internvl").restore(tmp_path / "saved")
    assert_same_session(restored, going)
    assert restored.seconds == dataclasses.replace(going.seconds, answer=restored.seconds.answer)


def test_a_session_that_broke_stays_broken_and_can_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = shared_engine("internvl")
    going = engine.open(budget=30)
    going.push(some_frames(5))
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "prefill", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            going.push(some_frames(1))
    going.save(tmp_path / "saved")
    restored = engine.restore(tmp_path / "saved")
    assert restored.ask(QUESTION) == going.ask(QUESTION)
    with pytest.raises(StateKVError, match="a step failed"):
        restored.push(some_frames(1))


def test_settings_of_answers_may_change_and_those_of_the_stream_may_not(saved: Path) -> None:
    engine = shared_engine("internvl")
    restored = engine.restore(saved, max_new_tokens=1, budget=30)
    assert restored.state.config == engine.open(budget=30, max_new_tokens=1).state.config
    assert len(restored.ask(QUESTION)) <= len(engine.restore(saved).ask(QUESTION))
    with pytest.raises(ConfigError, match="was watched with budget 30, not 31") as caught:
        engine.restore(saved, budget=31)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="unknown setting 'bugdet'"):
        engine.restore(saved, bugdet=30)


# The video


def test_a_file_that_is_gone_is_missed_only_when_it_is_watched(clip: Path, tmp_path: Path) -> None:
    engine, here = shared_engine("internvl"), tmp_path / "here.mp4"
    here.write_bytes(clip.read_bytes())
    going = engine.open(here, budget=30)
    going.watch(until_seconds=5)
    going.save(tmp_path / "saved")
    there = here.rename(tmp_path / "there.mp4")
    restored = engine.restore(tmp_path / "saved")
    assert restored.ask(QUESTION) == going.ask(QUESTION)
    frames = restored.frames
    for _ in range(2):  # behind the frames that were read ahead
        with pytest.raises(VideoError, match=r"here\.mp4 is not there any more"):
            restored.watch()
    restored.save(tmp_path / "again")
    moved = engine.restore(tmp_path / "again", source=there)
    moved.watch()
    going.watch()
    assert frames < moved.frames == FRAMES
    assert_same_session(moved, going)


def test_a_file_that_does_not_tell_its_length(tmp_path: Path) -> None:
    engine, clip = shared_engine("internvl"), write_clip(tmp_path / "clip.h264", range(60), format="h264")
    assert probe(clip).num_frames is None
    never, going = (engine.open(clip, budget=30, fps=5, vision_batch=2) for _ in range(2))
    going.watch(until_seconds=1)
    going.save(tmp_path / "saved")
    restored = engine.restore(tmp_path / "saved")
    for each in (restored, never):
        each.watch()
    assert restored.frames == never.frames > 8
    assert_same_session(restored, never)


def test_another_file_in_its_place_is_refused(clip: Path, tmp_path: Path) -> None:
    engine, here = shared_engine("internvl"), tmp_path / "here.mp4"
    here.write_bytes(clip.read_bytes())
    going = engine.open(here, budget=30, vision_batch=1)
    going.watch(until_seconds=5)
    going.save(tmp_path / "saved")
    write_video(here, video(2 * FRAMES, seed=1), fps=2)
    with pytest.raises(VideoError, match="is not the file that was watched"):
        engine.restore(tmp_path / "saved").watch()
    with pytest.raises(VideoError, match="is not the file that was watched"):
        engine.restore(tmp_path / "saved", source=here)
    engine.restore(tmp_path / "saved", source=clip).watch()


def test_a_video_that_was_watched_to_its_end_is_not_needed_any_more(clip: Path, tmp_path: Path) -> None:
    engine, here = shared_engine("internvl"), tmp_path / "here.mp4"
    here.write_bytes(clip.read_bytes())
    going = engine.open(here, budget=30)
    going.watch()
    going.save(tmp_path / "saved")
    here.unlink()
    restored = engine.restore(tmp_path / "saved")
    restored.watch()
    assert_same_session(restored, going)


# What is refused


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    session = shared_engine("internvl").open(budget=30)
    session.push(some_frames(5))
    session.save(tmp_path / "saved")
    return tmp_path / "saved"


def fresh_engine(family: str) -> Engine:
    return Engine(adapted(tiny(family)), Config(max_new_tokens=6))


def _other_weights(engine: Engine) -> None:
    """As little as training changes."""
    with torch.no_grad():
        engine.model.language_model.layers[1].self_attn.k_proj.weight.mul_(1.0001)


def _half(engine: Engine) -> None:
    engine.model.model.bfloat16()


def _other_template(engine: Engine) -> None:
    assert engine.model.texts is not None
    engine.model.texts = dataclasses.replace(engine.model.texts, chat_template="{{ 1 }}")


def _other_frequencies(engine: Engine) -> None:
    engine.model.rope.frequencies = lambda horizon: torch.ones(8)  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_other_weights, "the weights of .* are others"),
        (_half, "in float32, this one is bfloat16"),
        (_other_template, "the chat template or the video processor"),
        (_other_frequencies, "other rotary frequencies"),
    ],
)
def test_another_model_is_refused(saved: Path, change: Callable[[Engine], None], reason: str) -> None:
    engine = fresh_engine("internvl")
    engine.restore(saved)
    change(engine)
    with pytest.raises(ModelError, match=reason) as caught:
        engine.restore(saved)
    assert "\n" not in str(caught.value)


def test_another_family_is_refused(saved: Path) -> None:
    with pytest.raises(ModelError, match="a model of the family internvl; this is") as caught:
        shared_engine("qwen3_vl").restore(saved)
    assert "\n" not in str(caught.value)


def test_a_stream_without_its_session_is_refused(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    with pytest.raises(SaveError, match="holds no saved session"):
        shared_engine("internvl").restore(tmp_path / "saved")


def test_a_damaged_file_is_named(saved: Path) -> None:
    path = next(saved.glob("frames.*"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SaveError, match=r"its file frames\.1\.safetensors is not as it was written"):
        shared_engine("internvl").restore(saved)


def test_nothing_is_saved_of_a_closed_session_nor_in_the_middle_of_an_answer_that_holds_it(tmp_path: Path) -> None:
    session = shared_engine("internvl").open(budget=30, memory="1MiB")
    session.push(some_frames(5))
    answer = session.stream(QUESTION)
    next(answer)
    for refused in (lambda: session.save(tmp_path / "saved"), session.fork):
        with pytest.raises(ConfigError, match="still being given"):
            refused()
    list(answer)
    session.close()
    for refused in (lambda: session.save(tmp_path / "saved"), session.fork):
        with pytest.raises(ConfigError, match="closed"):
            refused()
    assert list(tmp_path.iterdir()) == []
