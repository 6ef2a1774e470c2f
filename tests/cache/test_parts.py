"""A cache in parts that are written once: which ones there are, and which files still hold them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from statekv.cache import parts as subject
from statekv.cache.archive import load_stream, save_stream
from statekv.cache.folder import read_folder
from statekv.cache.parts import Written, ranges
from statekv.cache.stream import StreamState
from statekv.engine.session import Session
from statekv.errors import SaveError
from tests.cache.test_folder import files_of_at_most
from tests.method.test_positions import opened, pictures
from tests.talk import assert_same_memory, memory, shared_engine, some_frames
from tests.tiny import FAMILIES

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
STEPS = 24
PART_TOKENS = 20


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 20 tokens of the tiny models, which are all of one size."""
    monkeypatch.setattr(subject, "PART_BYTES", PART_TOKENS * shared_engine("internvl").model.geometry().bytes_per_token)


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
    loaded = Session(session.stepper, load_stream(folder, session.state.geometry))
    assert loaded.state.spans == session.state.spans
    assert_same_memory(memory(loaded), memory(session))


def test_parts_are_of_one_size_and_stay_what_they_are() -> None:
    size = subject.PART_BYTES // 1000 + 1
    assert list(ranges(0, 1000)) == []
    assert list(ranges(size, 1000)) == [(0, size)]
    assert list(ranges(2 * size + 1, 1000)) == [(0, size), (size, 2 * size), (2 * size, 2 * size + 1)]
    assert list(ranges(2, 10 * subject.PART_BYTES)) == [(0, 1), (1, 2)]


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
    per_token, tokens = session.state.geometry.bytes_per_token, 0
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
    restored = Session(session.stepper, load_stream(tmp_path, session.state.geometry))
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
    first, second = (Session(session.stepper, load_stream(tmp_path, session.state.geometry)) for _ in range(2))
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
