"""Capped streams saved and restored: every tier as it was, to the bit, and blocks written once."""

from __future__ import annotations

import errno
import gc
import os
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from statekv.cache.folder import FACTS
from statekv.engine.session import Session
from statekv.errors import ConfigError, SaveError, StorageError, StorageWarning
from tests.cache.tiers.test_tiers import carried, held, opened, pictures, spots, tiered, tight
from tests.processes.killing import kill_at_moments
from tests.talk import QUESTION, assert_same_memory, frames_of, shared_engine
from tests.tiny import video

TWO_FAMILIES = pytest.mark.parametrize("family", ["internvl", "qwen3_vl"])
KINDS: dict[str, dict[str, Any]] = {
    "forgets": {},
    "host": {"host_memory": "1GiB"},
    "host and disk": {"host_memory": "60KiB", "disk": "1GiB"},
    "bits": {"bits": 4, "host_memory": "10KiB", "disk": "20KiB"},
    "retrieve": {"recall": "retrieve", "retrieve": 3, "disk": "60KiB"},
}
EVERY_KIND = pytest.mark.parametrize(
    ("family", "kind"),
    [
        *(("internvl", kind) for kind in KINDS.values()),
        *(("qwen3_vl", KINDS[name]) for name in ("host and disk", "retrieve")),
    ],
    ids=str,
)


def assert_same_tiers(found: Session, expected: Session) -> None:
    """All that is held, where it lies, and what comes of it."""
    assert spots(found) == spots(expected)
    assert_same_memory(held(found), held(expected))
    assert_same_memory(carried(found), carried(expected))
    taken, due = found.state.nbytes, expected.state.nbytes
    unlike = {"recent": 0, "carried": 0}  # what questions brought in, and slots that only the next step needs
    assert taken | unlike == due | unlike
    for name in ("forgotten", "spans", "outlived", "position"):
        assert getattr(found.state, name) == getattr(expected.state, name)
    ranks = [[entry.rank for entry in tiered(each).entries.values()] for each in (found, expected)]
    assert ranks[0] == ranks[1]
    assert torch.equal(found.logits(QUESTION), expected.logits(QUESTION))


@EVERY_KIND
def test_restored_and_continued_equals_never_interrupted(family: str, kind: dict[str, Any], tmp_path: Path) -> None:
    settings = tight(family, **kind)
    never, going = opened(family, **settings), opened(family, **settings)
    never.push(pictures())
    for number, frame in enumerate(pictures()):
        going.push([frame])
        if number % 8 == 5:
            going.save(tmp_path / "saved")
            going.close()
            going = shared_engine(family).restore(tmp_path / "saved")
    assert len(tiered(going).manager) or not tiered(going).manager.open
    assert_same_tiers(going, never)


@pytest.mark.parametrize("family", ["internvl", "llava_onevision"])
def test_steps_in_blocks_that_have_moved(family: str, tmp_path: Path) -> None:
    settings = {**tight(family, host_memory="1GiB"), "horizon": 450, "on_horizon": "compact"}
    going = opened(family, **settings)
    going.push([*pictures(), *frames_of(video(30, seed=6), start_seconds=200)])
    assert any(entry.moved for entry in tiered(going).entries.values())
    going.save(tmp_path / "saved")
    assert_same_tiers(shared_engine(family).restore(tmp_path / "saved"), going)


@TWO_FAMILIES
def test_a_block_is_written_once(family: str, tmp_path: Path) -> None:
    going = opened(family, **tight(family, disk="1GiB"))
    going.push(pictures()[:16])
    going.save(tmp_path / "saved")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "saved").glob("block-*")}
    assert before
    going.push(pictures()[16:])
    going.save(tmp_path / "saved")
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "saved").glob("block-*")}
    assert len(after) > len(before)
    assert before.items() <= after.items()
    restored = shared_engine(family).restore(tmp_path / "saved")
    restored.save(tmp_path / "saved")
    assert after == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "saved").glob("block-*")}


@TWO_FAMILIES
def test_what_was_forgotten_is_not_saved_again(family: str, tmp_path: Path) -> None:
    """Tokens have other neighbours in the buffers then: a file with the ones that left must not stand for them."""
    going = opened(family, **tight(family, 4))
    for number, frame in enumerate(pictures()):
        going.push([frame])
        if number % 4 == 1:
            going.save(tmp_path / "saved")
    assert going.state.forgotten
    assert_same_tiers(shared_engine(family).restore(tmp_path / "saved"), going)


def test_another_cap_is_refused_and_another_folder_is_not(tmp_path: Path) -> None:
    going = opened("internvl", **tight("internvl", disk="1GiB"))
    going.push(pictures())
    going.save(tmp_path / "saved")
    with pytest.raises(ConfigError, match="was watched with memory"):
        shared_engine("internvl").restore(tmp_path / "saved", memory="1GiB")
    (tmp_path / "blocks").mkdir()
    restored = shared_engine("internvl").restore(tmp_path / "saved", disk_folder=str(tmp_path / "blocks"))
    assert list((tmp_path / "blocks").rglob("blocks"))
    assert_same_memory(held(restored), held(going))


def test_a_disk_without_room_for_the_blocks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    going = opened("internvl", **tight("internvl", disk="1GiB"))
    going.push(pictures())
    going.save(tmp_path / "saved")
    (tmp_path / "blocks").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", no_space)
        with pytest.raises(StorageError, match=r"cannot be written: No space .*disk_folder"):
            shared_engine("internvl").restore(tmp_path / "saved", disk_folder=str(tmp_path / "blocks"))
    gc.collect()
    assert not list((tmp_path / "blocks").iterdir())
    restored = shared_engine("internvl").restore(tmp_path / "saved", disk_folder=str(tmp_path / "blocks"))
    assert_same_memory(held(restored), held(going))


def no_space(*_: Any) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_damaged_block_of_a_save_is_named(tmp_path: Path) -> None:
    going = opened("internvl", **tight("internvl", disk="1GiB"))
    going.push(pictures())
    going.save(tmp_path / "saved")
    file = sorted((tmp_path / "saved").glob("block-*"))[0]
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(SaveError, match=rf"{file.name} is not as it was written"):
        shared_engine("internvl").restore(tmp_path / "saved")


@TWO_FAMILIES
def test_damaged_steps_are_left_out_of_a_save_and_named(family: str, tmp_path: Path) -> None:
    going = opened(family, **tight(family, disk="1GiB"), disk_folder=str(tmp_path))
    going.push(pictures())
    on_disk = [entry for entry in tiered(going).entries.values() if entry.block is not None]
    (file,) = tmp_path.rglob("blocks")
    with file.open("r+b") as damaged:
        for place in (0, file.stat().st_size - 9):  # of two blocks
            damaged.seek(place)
            damaged.write(b"?!")
    with pytest.warns(StorageWarning, match=rf"{file} does not hold .*; damaged steps forgotten: 1") as told:
        going.save(tmp_path / "saved")
    assert len(told) == going.state.forgotten == 2
    assert len(tiered(going).entries) == len({each.start for each in tiered(going).entries.values()})
    assert [each.start in tiered(going).entries for each in on_disk] == [False, *[True] * (len(on_disk) - 2), False]
    restored = shared_engine(family).restore(tmp_path / "saved")
    assert_same_tiers(restored, going)
    for session in (restored, going):
        session.push(pictures()[:2])
    assert_same_tiers(restored, going)


@pytest.mark.parametrize("family", ["internvl", "llava_onevision"])
def test_damaged_steps_that_have_moved_are_left_out_of_a_save(family: str, tmp_path: Path) -> None:
    settings = {**tight(family, disk="1GiB"), "horizon": 450, "on_horizon": "compact"}
    going = opened(family, **settings, disk_folder=str(tmp_path))
    going.push([*pictures(), *frames_of(video(30, seed=6), start_seconds=200)])
    on_disk = [entry for entry in tiered(going).entries.values() if entry.block is not None]
    moved = next(number for number, entry in enumerate(on_disk) if entry.moved)
    (file,) = tmp_path.rglob("blocks")
    with file.open("r+b") as damaged:  # in its last layer; steps lie there as they came
        end = sum(entry.length for entry in on_disk[: moved + 1]) * tiered(going).spec.bytes_per_token
        damaged.seek(end - 2)
        damaged.write(b"?!")
    with pytest.warns(StorageWarning, match="damaged steps forgotten: 1"):
        going.save(tmp_path / "saved")
    assert on_disk[moved].start not in tiered(going).entries
    assert going.state.forgotten == 1
    assert_same_tiers(shared_engine(family).restore(tmp_path / "saved"), going)


def run(settings: dict[str, Any], place: Path) -> None:
    """A capped stream that is saved now and then, its blocks in a folder beside the saves."""
    (place / "blocks").mkdir()
    going = opened("internvl", **settings, disk_folder=str(place / "blocks"))
    for number, frame in enumerate(pictures()):
        going.push([frame])
        if number % 6 == 5:
            going.save(place / "saved")


# Every step that is written to the tier's file or leaves it, every closing of gaps, every file and rename of a save.
_IMPORTS = """
from statekv.cache import folder
from statekv.cache.tiers import cache as tiered
from statekv.cache.tiers.disk import SpillFile
from tests.cache.tiers.test_tiers_saving import run, shared_engine
"""
_CALLS = """
    (SpillFile, "write"), (SpillFile, "give"), (tiered, "close_gaps"), (folder, "save_file"), (os, "replace"),
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_while_blocks_move_it_goes_on_from_the_save(tmp_path: Path) -> None:
    settings = tight("internvl", bits=8, host_memory="10KiB", disk="30KiB")
    kill_at_moments(_IMPORTS, _CALLS, 'shared_engine("internvl")', f"run({settings!r}, place)", tmp_path, 17)
    never = opened("internvl", **settings)
    never.push(pictures())
    assert never.state.forgotten
    found = set()
    for place in tmp_path.iterdir():
        if (place / "saved" / FACTS).exists():
            restored = shared_engine("internvl").restore(place / "saved", disk_folder=str(place / "blocks"))
            found.add(restored.frames)
            restored.push(pictures()[restored.frames :])
            assert_same_tiers(restored, never)
            assert len(list((place / "blocks").iterdir())) == 1  # what the killed one left behind is gone
    assert len(found) > 3


@TWO_FAMILIES
def test_a_capped_stream_goes_on_beyond_int32(family: str, tmp_path: Path) -> None:
    """What it holds does not depend on how many tokens have come before; wider numbers take their part of the cap."""
    settings = {**tight(family, 12, disk="1GiB"), "pin_newest": 1}
    far, near = opened(family, **settings), opened(family, **settings)
    for session in (far, near):
        session.push(pictures()[:16])
    before, plan = near.state.tokens, tiered(far).plan
    tiered(far).away += 2**31 - 50  # a few billion tokens pass
    for session in (far, near):
        session.push(pictures()[16:])
    assert far.state.tokens - near.state.tokens == 2**31 - 50 < 2**31 < far.state.tokens
    assert plan is not None
    assert tiered(near).plan == plan
    assert tiered(far).plan != plan
    for layer in range(far.state.spec.layers):
        tokens = carried(near)[layer]
        assert torch.equal(carried(far)[layer], tokens.long() + (2**31 - 50) * (tokens >= before))
    far.save(tmp_path / "saved")
    assert_same_tiers(shared_engine(family).restore(tmp_path / "saved"), far)
