"""A folder holds one whole save at any moment; what is none is named and refused."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from statekv.cache import folder as subject
from statekv.cache.folder import FACTS, FORMAT, Piece, read_folder, write_folder
from statekv.errors import SaveError
from tests.processes import forked

SIZE = 5_000  # elements of a tensor
SAME = "tokens-000000000"


def write(folder: Path, number: int) -> None:
    """A file that is always the same, three that say `number`, and a fact that says so too."""
    pieces = [Piece(f"layer-{layer:02d}", lambda layer=layer: filled(number + layer)) for layer in range(3)]  # type: ignore[misc]
    digest = read_folder(folder).files[SAME]["sha256"] if (folder / FACTS).exists() and readable(folder) else None
    write_folder(folder, {"number": number}, [Piece(SAME, lambda: filled(7), digest), *pieces])


def filled(number: int) -> dict[str, torch.Tensor]:
    return {"x": torch.full((SIZE,), number)}


def readable(folder: Path) -> bool:
    try:
        read_folder(folder)
    except SaveError:
        return False
    return True


def number_of(folder: Path) -> int:
    """What the folder says, after checking that all of it says the same."""
    found = read_folder(folder)
    number: int = found.facts["number"]
    for layer in range(3):
        assert torch.equal(found.part(f"layer-{layer:02d}")["x"], filled(number + layer)["x"])
    assert torch.equal(found.part(SAME)["x"], filled(7)["x"])
    return number


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    write(tmp_path / "saved", 10)
    return tmp_path / "saved"


def test_a_second_write_replaces_the_first_and_leaves_nothing_of_it(saved: Path) -> None:
    assert number_of(saved) == 10
    write(saved, 20)
    assert number_of(saved) == 20
    layers = [f"layer-{layer:02d}.2.safetensors" for layer in range(3)]
    assert names(saved) == [*layers, FACTS, f"{SAME}.1.safetensors"]


def test_facts_come_back_as_they_were(tmp_path: Path) -> None:
    facts = {"a": 0.1 + 0.2, "b": [1, None, "ü"], "c": {"d": True}}
    write_folder(tmp_path / "saved", facts, [])
    assert read_folder(tmp_path / "saved").facts == facts


# Written once


def test_a_piece_that_the_folder_holds_already_is_not_written_again(saved: Path) -> None:
    before = (saved / f"{SAME}.1.safetensors").stat()
    for number in (20, 30):
        write(saved, number)
        assert number_of(saved) == number
        after = (saved / f"{SAME}.1.safetensors").stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"x")])
def test_a_file_that_is_plainly_damaged_does_not_count_as_held(saved: Path, damage: Callable[[Path], None]) -> None:
    damage(saved / f"{SAME}.1.safetensors")
    write(saved, 20)
    assert number_of(saved) == 20


def test_another_folder_gets_all_of_it(saved: Path, tmp_path: Path) -> None:
    digest = read_folder(saved).files[SAME]["sha256"]
    found = write_folder(tmp_path / "other", {}, [Piece(SAME, lambda: filled(7), digest)])
    assert torch.equal(read_folder(tmp_path / "other").part(SAME)["x"], filled(7)["x"])
    assert found == {SAME: digest}


# Killed

_KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from statekv.cache import folder as subject
from tests.cache.test_folder import write

old, rounds = Path(sys.argv[1]), Path(sys.argv[2])
left = 0

def dying(call, half=None):
    def instead(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        found = call(*args, **kwargs)
        left -= 1
        if left == 0:
            if half is not None:
                os.truncate(half(*args), os.path.getsize(half(*args)) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return found
    return instead

subject.save_file = dying(subject.save_file, lambda tensors, path: path)
subject.json.dump = dying(subject.json.dump)
for name in ("fsync", "replace", "unlink"):
    setattr(os, name, dying(getattr(os, name)))
moment = 0
while True:
    moment += 1
    folder = rounds / str(moment)
    shutil.copytree(old, folder)
    child = os.fork()
    if child == 0:
        left = moment
        write(folder, 20)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


def test_killed_at_any_moment_the_old_or_the_new_is_left(saved: Path, tmp_path: Path) -> None:
    """SIGKILL before and after each write, sync, rename and removal, and in the middle of files."""
    rounds = tmp_path / "rounds"
    rounds.mkdir()
    forked.run(saved, rounds, program=_KILLED).check_returncode()
    folders = sorted(rounds.iterdir(), key=lambda path: int(path.name))
    found = [number_of(folder) for folder in folders]
    assert found == sorted(found)  # once it is the new one, it stays that
    assert found.count(10) > 12
    assert found.count(20) > 3
    for folder in folders:  # a killed write is in nobody's way, and what it left goes
        write(folder, 30)
        assert number_of(folder) == 30
        assert len(names(folder)) == 5


def test_what_counts_is_on_the_disk_before_it_is_named(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut cannot be had; what the system was asked for before and behind the one rename can."""
    sync, replace, former = os.fsync, os.replace, {*names(saved)}
    sizes: dict[int, int] = {}  # of what is on the disk, by inode
    at_the_rename: list[dict[int, int]] = []

    def noted_sync(descriptor: int) -> None:
        sync(descriptor)
        found = os.fstat(descriptor)
        sizes[found.st_ino] = found.st_size

    def noted_replace(source: Path, target: Path) -> None:
        at_the_rename.append(dict(sizes))
        sizes.clear()
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write(saved, 20)
    (before,) = at_the_rename
    fresh = [path.stat() for path in saved.iterdir() if path.name not in former or path.name == FACTS]
    assert len(fresh) == 4
    assert all(before.get(file.st_ino) == file.st_size for file in fresh)
    assert saved.stat().st_ino in before
    assert saved.stat().st_ino in sizes


def test_what_a_killed_first_write_left_does_not_count_and_goes(tmp_path: Path) -> None:
    write(tmp_path / "other", 10)
    (tmp_path / "other" / FACTS).rename(tmp_path / "other" / f"{FACTS}.part")
    with pytest.raises(SaveError, match="holds no saved session"):
        read_folder(tmp_path / "other")
    write(tmp_path / "other", 20)
    assert number_of(tmp_path / "other") == 20
    assert len(names(tmp_path / "other")) == 5


# Writes that fail


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system refuses to write on, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_where_no_more_can_be_written_the_old_one_stays(saved: Path) -> None:
    with files_of_at_most(SIZE), pytest.raises(SaveError) as caught:
        write(saved, 20)
    assert str(saved) in caught.value.message
    assert "cannot be written" in caught.value.message
    assert "intact" in caught.value.hint
    assert "\n" not in str(caught.value)
    assert number_of(saved) == 10
    layers = [f"layer-{layer:02d}.1.safetensors" for layer in range(3)]
    assert names(saved) == [*layers, FACTS, f"{SAME}.1.safetensors"]


def test_nothing_is_left_of_a_first_write_that_fails(tmp_path: Path) -> None:
    with files_of_at_most(SIZE), pytest.raises(SaveError, match="cannot be written"):
        write(tmp_path / "saved", 20)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("moment", ["_write_part", "_publish"])
def test_what_was_written_of_a_failed_save_is_removed(
    saved: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, moment: str
) -> None:
    original = getattr(subject, moment)

    def fail(path: Path, *rest: Any) -> NoReturn:
        if moment == "_write_part":
            original(path, *rest)
        raise error

    before = names(saved)
    with monkeypatch.context() as patch:
        patch.setattr(subject, moment, fail)
        with pytest.raises((SaveError, KeyboardInterrupt)):
            write(saved, 20)
    assert (names(saved), number_of(saved)) == (before, 10)


def test_two_that_save_to_one_folder_wait_for_each_other(tmp_path: Path) -> None:
    """Locks of threads keep each other out as those of processes do."""
    found = tmp_path / "saved"

    def save() -> None:
        for number in range(20):
            write(found, number)

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(save) for _ in range(2)]:
            done.result(timeout=60)
    assert number_of(found) == 19
    assert len(names(found)) == 5


def test_who_keeps_the_lock_is_named(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "_PATIENCE_SECONDS", 0.1)
    held = subject._lock(saved / "lock")
    try:
        with pytest.raises(SaveError, match=rf"process {os.getpid()} has been saving to {saved}"):
            write(saved, 20)
    finally:
        os.close(held)  # as where its process is killed: the file stays
    assert number_of(saved) == 10
    write(saved, 20)
    assert number_of(saved) == 20
    assert "lock" not in names(saved)


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"x")
    with pytest.raises(SaveError, match="holds other files") as caught:
        write(tmp_path, 10)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["photo.jpg"]
    with pytest.raises(SaveError, match="is a file, not a folder"):
        write(tmp_path / "photo.jpg", 10)


@pytest.mark.parametrize("name", [FACTS, "model-00001-of-00002.safetensors", "weights.1.safetensors"])
def test_files_of_other_programs_are_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(SaveError, match="holds other files"):
        write(tmp_path, 10)
    assert names(tmp_path) == [name]


def test_a_guest_in_a_saved_folder_stays(saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    write(saved, 20)
    assert (saved / "notes.txt").read_text() == "mine"


# What is refused


@pytest.mark.parametrize(
    ("name", "problem"), [("nowhere", "does not exist"), ("", "holds no saved session"), ("file", "is not a folder")]
)
def test_what_is_no_saved_folder_is_refused(tmp_path: Path, name: str, problem: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SaveError, match=problem) as caught:
        read_folder(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_another_format_is_refused(saved: Path) -> None:
    edit_text(saved, f'"format": {FORMAT}', '"format": 99')
    with pytest.raises(SaveError, match=f"in format 99, this version reads {FORMAT}"):
        read_folder(saved)


def _garble(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _garble_the_head(path: Path) -> None:
    path.write_bytes(b"<html>404</html>" * 20)


@pytest.mark.parametrize("damage", [_garble, _truncate, _garble_the_head, Path.unlink])
def test_a_damaged_file_is_named(saved: Path, damage: Callable[[Path], None]) -> None:
    damage(saved / "layer-01.1.safetensors")
    found = read_folder(saved)
    found.part("layer-00")
    with pytest.raises(SaveError, match=r"is damaged: its file layer-01\.1\.safetensors") as caught:
        found.part("layer-01")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '"format"', "\xff"])
def test_facts_that_are_none_are_refused(saved: Path, text: str) -> None:
    (saved / FACTS).write_bytes(text.encode("latin-1"))
    with pytest.raises(SaveError, match=r"is damaged: session\.json"):
        read_folder(saved)


def test_facts_that_were_changed_are_refused(saved: Path) -> None:
    edit_text(saved, '"number": 10', '"number": 11')
    with pytest.raises(SaveError, match=r"session\.json is not as it was written"):
        read_folder(saved)


def test_a_damaged_folder_can_be_written_anew(saved: Path) -> None:
    (saved / FACTS).write_text("{")
    write(saved, 20)
    assert number_of(saved) == 20


def test_no_file_outside_of_the_folder_is_read(saved: Path) -> None:
    shutil.copy(saved / "layer-01.1.safetensors", saved.parent / "layer-01.1.safetensors")
    facts = json.loads((saved / FACTS).read_text())
    del facts["format"], facts["check"]
    facts["files"]["layer-01"]["name"] = "../layer-01.1.safetensors"
    subject._publish(saved, facts)
    with pytest.raises(SaveError, match="is missing"):
        read_folder(saved).part("layer-01")


def edit_text(folder: Path, old: str, new: str) -> None:
    text = (folder / FACTS).read_text()
    assert old in text
    (folder / FACTS).write_text(text.replace(old, new))
