"""A folder of one process goes when the process does; what others hold, and what is not ours, stays."""

from __future__ import annotations

import gc
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from statekv.cache.tiers import disk as subject
from statekv.cache.tiers.disk import BLOCKS, SpillDir
from statekv.errors import StorageError
from tests.processes.forked import Process

_HOLDER = """
import sys
from pathlib import Path
from statekv.cache.tiers.disk import BLOCKS, SpillDir

room = SpillDir(Path(sys.argv[1]))
(room.folder / BLOCKS).write_bytes(b"some")
print(room.folder, flush=True)
sys.stdin.readline()
"""


@contextmanager
def holder(parent: Path) -> Iterator[tuple[Process, Path]]:
    """Another process that has a room with blocks in it, for so long; then it ends by itself unless it has been."""
    (reads, ends), (hears, tells) = os.pipe(), os.pipe()
    process = Process(parent, program=_HOLDER, streams=(reads, tells, 2))
    os.close(reads)
    os.close(tells)
    with open(hears) as said:
        folder = Path(said.readline().strip())
    assert {path.name for path in folder.iterdir()} == {"lock", BLOCKS}
    yield process, folder
    os.close(ends)
    process.wait()


def fill(room: SpillDir) -> None:
    (room.folder / BLOCKS).write_bytes(b"some")


def abandoned(parent: Path, name: str = "statekv-abcdefgh") -> Path:
    """What a killed process leaves."""
    (parent / name).mkdir()
    (parent / name / "lock").touch()
    (parent / name / BLOCKS).write_bytes(b"x")
    return parent / name


def test_made_when_it_is_asked_for_and_for_nobody_else(tmp_path: Path) -> None:
    room = SpillDir(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert room.folder.parent == tmp_path
    assert room.folder == room.folder
    assert stat.S_IMODE(room.folder.stat().st_mode) == 0o700


def test_by_default_among_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert SpillDir().folder.parent == tmp_path


def test_close_removes_it_and_it_can_be_had_again(tmp_path: Path) -> None:
    room = SpillDir(tmp_path)
    room.close()
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        fill(room)
        room.close()
        room.close()
        assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_goes_with_the_object(tmp_path: Path) -> None:
    room = SpillDir(tmp_path)
    fill(room)
    del room
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_goes_when_the_process_ends(tmp_path: Path) -> None:
    with holder(tmp_path) as (process, _):
        pass
    assert process.returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_it_to_the_next_one(tmp_path: Path) -> None:
    with holder(tmp_path) as (process, folder):
        process.kill()
        process.wait()
    assert (folder / BLOCKS).exists()
    room = SpillDir(tmp_path)
    assert room.folder != folder
    assert list(tmp_path.iterdir()) == [room.folder]


def test_what_another_process_holds_stays(tmp_path: Path) -> None:
    with holder(tmp_path) as (_, folder):
        fill(SpillDir(tmp_path))
        assert {path.name for path in folder.iterdir()} == {"lock", BLOCKS}


def test_rooms_of_one_process_leave_each_other_alone(tmp_path: Path) -> None:
    rooms = [SpillDir(tmp_path) for _ in range(3)]
    for room in rooms:
        fill(room)
    rooms[1].close()
    assert {path for path in tmp_path.iterdir() if (path / BLOCKS).exists()} == {rooms[0].folder, rooms[2].folder}


def test_a_fork_does_not_remove_what_its_parent_has(tmp_path: Path) -> None:
    room = SpillDir(tmp_path)
    fill(room)
    child = os.fork()
    if child == 0:
        room.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert (room.folder / BLOCKS).exists()


# What is not ours


def test_nothing_but_our_own_is_swept(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    precious = abandoned(outside, "precious")
    parent = tmp_path / "parent"
    parent.mkdir()
    (parent / "statekv-linkxxxx").symlink_to(precious)  # a folder of that name, elsewhere
    (parent / "statekv-filexxxx").write_text("mine")
    (parent / "statekv-nolockxx").mkdir()
    (parent / "statekv-nolockxx" / BLOCKS).write_text("mine")
    abandoned(parent, "statekv-other-name")
    linked = abandoned(parent, "statekv-locklink")
    (linked / "lock").unlink()
    (linked / "lock").symlink_to(precious / "lock")
    before = sorted(tmp_path.rglob("*"))
    room = SpillDir(parent)
    made = {room.folder, room.folder / "lock"}
    assert sorted(set(tmp_path.rglob("*")) - made) == before
    room.close()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("own", [False, True])
def test_guests_in_a_folder_stay(tmp_path: Path, own: bool) -> None:
    """Whether the folder is swept or closed: blocks go, a file, a folder and a link of the user do not."""
    room = SpillDir(tmp_path)
    folder = room.folder if own else abandoned(tmp_path)
    (folder / BLOCKS).write_bytes(b"x")
    (folder / "notes.txt").write_text("mine")
    (folder / "6.block").mkdir()
    assert room.folder.exists()
    room.close()
    assert {path.name for path in folder.iterdir()} == {"lock", "notes.txt", "6.block"}


@pytest.mark.parametrize("own", [False, True])
def test_what_is_called_like_blocks_and_is_none_stays(tmp_path: Path, own: bool) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    rooms = [SpillDir(tmp_path) for _ in range(2)]
    folders = [room.folder for room in rooms] if own else [abandoned(tmp_path, f"statekv-abcdefg{n}") for n in "hi"]
    for folder in folders:
        (folder / BLOCKS).unlink(missing_ok=True)
    (folders[0] / BLOCKS).symlink_to(precious)
    (folders[1] / BLOCKS).mkdir()
    assert rooms[0].folder.exists()
    for room in rooms:
        room.close()
    assert all({path.name for path in folder.iterdir()} == {"lock", BLOCKS} for folder in folders)
    assert precious.read_text() == "mine"


# What cannot be


@pytest.mark.parametrize(("name", "problem"), [("nowhere", "does not exist"), ("file", "is not a folder")])
def test_a_parent_that_is_none_is_refused(tmp_path: Path, name: str, problem: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=f"disk_folder is .*{name}, which {problem}") as caught:
        SpillDir(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = SpillDir(Path("/proc"))
    with pytest.raises(StorageError, match="no folder can be made in /proc: ") as caught:
        _ = room.folder
    assert "\n" not in str(caught.value)


def test_where_nothing_can_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on some network disks; nothing is left there."""

    def refuse(descriptor: int) -> bool:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(subject, "_locked", refuse)
    with pytest.raises(StorageError, match="No locks available"):
        _ = SpillDir(tmp_path).folder
    assert list(tmp_path.iterdir()) == []


def test_swept_before_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process takes the new folder for an abandoned one: a second one is made."""
    original, calls = subject._locked, []

    def late(descriptor: int) -> bool:
        calls.append(descriptor)
        if len(calls) == 1:
            (folder,) = tmp_path.iterdir()
            subject._remove(folder)
        return original(descriptor)

    monkeypatch.setattr(subject, "_locked", late)
    room = SpillDir(tmp_path)
    fill(room)
    assert len(calls) == 2
    assert list(tmp_path.iterdir()) == [room.folder]
