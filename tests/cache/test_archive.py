"""Saving and loading a stream equals going on with it, bit for bit; what is no whole saved stream is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from statekv.cache import folder as subject
from statekv.cache.archive import load_stream, save_stream
from statekv.cache.carried import CarriedCache
from statekv.cache.folder import Piece, Written, read_folder, write_folder
from statekv.cache.stream import StreamState
from statekv.engine.session import Session
from statekv.errors import ModelError, SaveError
from tests.cache.test_folder import files_of_at_most
from tests.method.test_positions import opened, pictures
from tests.talk import (
    QUESTION,
    assert_same_answer,
    assert_same_memory,
    assert_same_stream,
    memory,
    session_answer,
    shared_engine,
    some_frames,
)
from tests.tiny import TWO_FAMILIES

FRAMES, SPLIT = 12, 6
STREAMS: dict[str, dict[str, Any]] = {
    "attention": {"budget": 30},
    "random": {"budget": 30, "carry": "random", "seed": 5},
    "pinned": {"budget": 30, "pin_prefix": True},
    "sink_recent": {"budget": 30, "carry": "sink_recent", "recall": "sink_recent", "sinks": 3},
    "all": {"carry": "all"},
    "release": {"budget": 30, "layout": "release"},
    "retrieve": {"budget": 30, "recall": "retrieve", "retrieve": 2, "retrieve_carried": True},
    "roomy": {"budget": 4000},
    "dials": {"budget": 30, "decay": 0.5, "layer_slope": 0.3, "pin_newest": 1, "coverage": 0.2, "value_norms": True},
}


def watched(family: str, frames: int, **settings: Any) -> Session:
    session = shared_engine(family).open(**settings)
    session.push(some_frames(FRAMES)[:frames])
    return session


def reloaded(session: Session, folder: Path) -> Session:
    save_stream(session.state, folder)
    return Session(session.runner, load_stream(folder, session.state.spec, rotary=session.runner.model))


@pytest.mark.parametrize(
    ("family", "name"),
    [*(("internvl", name) for name in STREAMS), *(("qwen3_vl", name) for name in ("attention", "all", "retrieve"))],
)
def test_a_loaded_stream_goes_on_as_if_nothing_had_happened(family: str, name: str, tmp_path: Path) -> None:
    going = watched(family, SPLIT, **STREAMS[name])
    loaded = reloaded(going, tmp_path / "saved")
    assert_same_stream(loaded, going)
    assert_same_answer(session_answer(loaded), session_answer(going))
    for frame in some_frames(FRAMES)[SPLIT:]:
        loaded.push([frame])
        going.push([frame])
    assert_same_stream(loaded, going)
    assert torch.equal(loaded.logits(QUESTION), going.logits(QUESTION))
    assert_same_slots(loaded.state, going.state)


def assert_same_slots(found: StreamState, expected: StreamState) -> None:
    """Also the order inside of the carried cache, which decides about ties."""
    if expected.config.carry == "all":
        return
    assert isinstance(found.carried, CarriedCache)
    assert isinstance(expected.carried, CarriedCache)
    assert found.carried.lengths == expected.carried.lengths
    for a, b, length in zip(found.carried.token_ids, expected.carried.token_ids, expected.carried.lengths, strict=True):
        assert torch.equal(a[..., :length], b[..., :length])


@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_settings_times_and_spans_come_back(family: str, tmp_path: Path) -> None:
    going = watched(family, SPLIT, budget=30, pin_prefix=True, horizon=900, max_new_tokens=3)
    found = reloaded(going, tmp_path / "saved").state
    for field in dataclasses.fields(StreamState):
        assert getattr(found, field.name) == getattr(going.state, field.name), field.name
    assert found.pinned > 0
    assert found.origin_seconds == 0.0


@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_an_empty_stream_can_be_saved(family: str, tmp_path: Path) -> None:
    loaded = reloaded(watched(family, 0, budget=30), tmp_path / "saved")
    loaded.push(some_frames(4))
    assert_same_stream(loaded, watched(family, 4, budget=30))


def test_asking_before_saving_changes_nothing(tmp_path: Path) -> None:
    asked = watched("internvl", SPLIT, budget=30)
    asked.ask(QUESTION)
    assert_same_stream(reloaded(asked, tmp_path / "saved"), watched("internvl", SPLIT, budget=30))


def test_saving_leaves_the_stream_alone(tmp_path: Path) -> None:
    going, other = (watched("internvl", SPLIT, budget=30, carry="random") for _ in range(2))
    save_stream(going.state, tmp_path / "saved")
    for session in (going, other):
        session.push(some_frames(FRAMES)[SPLIT:])
    assert_same_stream(going, other)


def test_a_loaded_stream_and_its_twin_do_not_share_memory(tmp_path: Path) -> None:
    loaded = reloaded(watched("internvl", SPLIT, budget=30), tmp_path / "saved")
    loaded.push(some_frames(FRAMES)[SPLIT:])
    again = load_stream(tmp_path / "saved", loaded.state.spec, rotary=loaded.runner.model)
    assert again.frames == SPLIT
    assert_same_stream(Session(loaded.runner, again), watched("internvl", SPLIT, budget=30))


def test_the_folder_holds_safetensors_and_json_and_no_more_than_the_tokens(tmp_path: Path) -> None:
    session = watched("internvl", SPLIT, budget=30)
    save_stream(session.state, tmp_path / "new" / "saved")
    folder, layers = tmp_path / "new" / "saved", session.state.spec.layers
    assert sorted(path.name for path in folder.iterdir()) == [
        *(f"layer-{layer:02d}.1.safetensors" for layer in range(layers)),
        "session.json",
        "steps.1.safetensors",
        "tokens-000000000.1.safetensors",
    ]
    assert [path.name for path in folder.parent.iterdir()] == ["saved"]
    json.loads((folder / "session.json").read_text())
    with safe_open(folder / "tokens-000000000.1.safetensors", "pt") as tensors:
        assert tensors.get_slice("layer-00").get_shape()[-2] == session.state.tokens
    per_token = session.state.spec.bytes_per_token
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert size < per_token * (session.state.tokens + 30) + 30_000


# What is refused


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_stream(watched("internvl", 2, budget=30).state, tmp_path / "saved")
    return tmp_path / "saved"


def kv_spec() -> Any:
    return shared_engine("internvl").model.kv_spec()


@pytest.mark.parametrize(
    "other",
    [
        {"kv_heads": 1},
        {"head_dim": 32},
        {"dtype": torch.bfloat16},
        {"devices": (torch.device("cpu"),) * 2},
        {"streams": 2},
    ],
)
def test_a_model_with_other_keys_is_refused(saved: Path, other: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="holds keys of") as caught:
        load_stream(saved, dataclasses.replace(kv_spec(), **other))
    assert "\n" not in str(caught.value)


def test_a_setting_of_another_version_is_named(saved: Path) -> None:
    rewrite(saved, lambda facts: facts["stream"]["config"].update(invented=1))
    with pytest.raises(SaveError, match="'invented', which this version does not know"):
        load_stream(saved, kv_spec())


def _without_geometry(facts: dict[str, Any]) -> None:
    del facts["stream"]["geometry"]


def _without_a_stream(facts: dict[str, Any]) -> None:
    del facts["stream"]


def _of_another_length(facts: dict[str, Any]) -> None:
    facts["stream"]["carried"][0] += 1


@pytest.mark.parametrize("edit", [_without_geometry, _without_a_stream, _of_another_length])
def test_facts_that_do_not_fit_together_are_refused_in_one_line(
    saved: Path, edit: Callable[[dict[str, Any]], None]
) -> None:
    rewrite(saved, edit)
    with pytest.raises(SaveError, match="is damaged: what it holds does not fit together") as caught:
        load_stream(saved, kv_spec())
    assert "\n" not in str(caught.value)


def rewrite(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Write a folder anew with other facts."""
    found = read_folder(folder)
    facts, pieces = dict(found.facts), [Piece(name, partial(found.part, name)) for name in found.files]
    edit(facts)
    write_folder(folder, facts, pieces)


EVERY_FAMILY = pytest.mark.parametrize("family", TWO_FAMILIES)
STEPS = 24
PART_TOKENS = 20


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 20 tokens of the tiny models, which are all of one size."""
    monkeypatch.setattr(subject, "PART_BYTES", PART_TOKENS * shared_engine("internvl").model.kv_spec().bytes_per_token)


def frames(count: int = STEPS) -> Sequence[Any]:
    return some_frames(count)


def sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}


def save(state: StreamState, folder: Path) -> tuple[int, int]:
    """Save; files and bytes of the detailed cache that were written for it."""
    before = sizes(folder)
    save_stream(state, folder)
    new = [size for name, size in sizes(folder).items() if name.startswith("tokens") and name not in before]
    return len(new), sum(new)


def assert_holds(folder: Path, session: Session) -> None:
    """The folder's stream is the session's, bit for bit."""
    loaded = Session(session.runner, load_stream(folder, session.state.spec))
    assert loaded.state.spans == session.state.spans
    assert_same_memory(memory(loaded), memory(session))


def test_what_changes_is_known_no_longer() -> None:
    written = Written()
    written.note({(0, 4): "a", (4, 8): "b", (8, 9): "c"})
    twin = written.copy()
    written.forget(9)
    assert written.digest(8, 9) == "c"
    written.forget(8)
    assert [written.digest(*spot) for spot in ((0, 4), (4, 8), (8, 9), (0, 8))] == ["a", "b", None, None]
    written.forget(5)
    assert [written.digest(*spot) for spot in ((0, 4), (4, 8))] == ["a", None]
    assert twin.digest(8, 9) == "c"


@pytest.mark.usefixtures("small")
@EVERY_FAMILY
def test_a_save_writes_what_is_new_and_one_open_part(family: str, tmp_path: Path) -> None:
    """Over a stream of any length, so that its cost does not grow."""
    session = shared_engine(family).open(budget=30)
    per_token, tokens = session.state.spec.bytes_per_token, 0
    for frame in frames():
        session.push([frame])
        files, written = save(session.state, tmp_path)
        new, tokens = session.state.tokens - tokens, session.state.tokens
        assert written <= per_token * (new + PART_TOKENS) + 2_000 * files  # each file has a head
        assert files <= 2 + new // PART_TOKENS
        assert len(list(tmp_path.glob("tokens-*"))) == -(-tokens // PART_TOKENS)
    assert tokens > 4 * PART_TOKENS
    assert_holds(tmp_path, session)


@pytest.mark.usefixtures("small")
def test_a_save_with_nothing_new_writes_nothing_of_the_detailed_cache(tmp_path: Path) -> None:
    session = shared_engine("internvl").open(budget=30)
    session.push(frames(9))
    assert save(session.state, tmp_path)[0] > 1
    session.ask("What happens in the video?")
    assert save(session.state, tmp_path) == (0, 0)
    assert_holds(tmp_path, session)


@pytest.mark.usefixtures("small")
@EVERY_FAMILY
def test_a_restored_stream_goes_on_where_its_folder_stands(family: str, tmp_path: Path) -> None:
    session = shared_engine(family).open(budget=30)
    session.push(frames(16))
    whole = save(session.state, tmp_path)[1]
    restored = Session(session.runner, load_stream(tmp_path, session.state.spec))
    restored.push(frames()[16:18])
    files, written = save(restored.state, tmp_path)
    assert files <= 3
    assert written < whole / 2
    assert_holds(tmp_path, restored)


@pytest.mark.usefixtures("small")
@EVERY_FAMILY
def test_keys_that_were_turned_are_written_anew(family: str, tmp_path: Path) -> None:
    """Compaction changes keys in place, also those of parts that were closed long before."""
    session, clip = opened(family), pictures(family)
    compacted = 0
    for picture in clip:
        before = session.state.compaction
        session.push([picture])
        files, _ = save(session.state, tmp_path)
        if session.state.compaction != before:
            compacted += 1
            assert files > 1
        assert_holds(tmp_path, session)
    assert compacted > 1


@pytest.mark.usefixtures("small")
@EVERY_FAMILY
@pytest.mark.parametrize("folders", [("one", "two"), ("one", "one")])
def test_forks_share_what_they_have_in_common(family: str, folders: tuple[str, str], tmp_path: Path) -> None:
    """In folders of their own, or in turns in one: whoever saves last is what the folder holds."""
    going = shared_engine(family).open(budget=30)
    going.push(frames(16))
    save(going.state, tmp_path / "one")
    fork = going.fork()
    for number in range(3):
        for each, folder, seed in ((going, folders[0], 1), (fork, folders[1], 2)):
            each.push(some_frames(6, seed=seed)[2 * number : 2 * number + 2])
            save(each.state, tmp_path / folder)
            assert_holds(tmp_path / folder, each)


@pytest.mark.usefixtures("small")
def test_two_sessions_restored_from_one_folder_do_not_take_each_others_tokens(tmp_path: Path) -> None:
    """They hold as many tokens, and other ones."""
    session = shared_engine("internvl").open(budget=30)
    session.push(frames(8))
    save(session.state, tmp_path)
    first, second = (Session(session.runner, load_stream(tmp_path, session.state.spec)) for _ in range(2))
    first.push(some_frames(9, seed=1))
    second.push(some_frames(9, seed=2))
    assert first.state.tokens == second.state.tokens
    for each in (first, second, first):
        save(each.state, tmp_path)
        assert_holds(tmp_path, each)


@pytest.mark.usefixtures("small")
def test_tokens_that_were_taken_back_and_others_in_their_place(tmp_path: Path) -> None:
    session = shared_engine("internvl").open(carry="all")
    session.push(frames(4))
    mark = session.state.mark()
    session.push(frames(8)[4:])
    save(session.state, tmp_path)
    with torch.inference_mode():
        session.state.crop_to(mark)
    session.push(some_frames(8, seed=3)[4:])
    save(session.state, tmp_path)
    assert_holds(tmp_path, session)


@pytest.mark.usefixtures("small")
def test_after_a_save_that_failed_the_next_one_is_whole(tmp_path: Path) -> None:
    session = shared_engine("internvl").open(budget=30)
    session.push(frames(8))
    save(session.state, tmp_path)
    held = sizes(tmp_path)
    session.push(frames(16)[8:])
    with files_of_at_most(8_000), pytest.raises(SaveError, match="cannot be written"):
        save(session.state, tmp_path)
    assert sizes(tmp_path) == held
    save(session.state, tmp_path)
    assert_holds(tmp_path, session)


@pytest.mark.usefixtures("small")
def test_the_folder_names_its_parts(tmp_path: Path) -> None:
    session = shared_engine("internvl").open(budget=30)
    session.push(frames(9))
    save(session.state, tmp_path)
    found = read_folder(tmp_path)
    parts = found.facts["stream"]["parts"]
    assert [first for first, _ in parts] == list(range(0, session.state.tokens, PART_TOKENS))
    assert parts[-1][1] == session.state.tokens
    assert {name for name in found.files if name.startswith("tokens")} == {f"tokens-{first:09d}" for first, _ in parts}
