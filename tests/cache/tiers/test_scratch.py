"""Pieces come back as they were written, or are refused; their bytes are used again."""

from __future__ import annotations

import gc
import os
import random
from pathlib import Path

import pytest

from statekv.cache.tiers.disk_room import BLOCKS, DiskRoom
from statekv.cache.tiers.scratch import Piece, Scratch
from statekv.errors import StorageError
from tests.cache.test_folder import files_of_at_most


def scratch(folder: Path) -> Scratch:
    return Scratch(DiskRoom(folder))


def parts(piece: Piece) -> list[bytes]:
    return [bytes(piece.read(number)) for number in range(piece.parts)]


def random_parts(draw: random.Random, longest: int = 50) -> list[bytes]:
    """As many as there may be layers, all of one length."""
    length = draw.randint(1, longest)
    return [draw.randbytes(length) for _ in range(draw.randint(1, 4))]


@pytest.mark.parametrize("seed", range(3))
def test_what_stays_is_as_it_was_whatever_comes_and_goes(seed: int, tmp_path: Path) -> None:
    draw, file, most = random.Random(seed), scratch(tmp_path), 0
    held: list[tuple[Piece, list[bytes]]] = []
    for _ in range(300):
        if held and draw.random() < 0.45:
            del held[draw.randrange(len(held))]
        written = random_parts(draw)
        held.append((file.write(written), written))
        assert held[-1][0].nbytes == sum(map(len, written))
        most = max(most, sum(piece.nbytes for piece, _ in held))
        assert file.path.stat().st_size <= most
    assert all(parts(piece) == written for piece, written in held)


def test_a_piece_in_several_spans_reads_part_by_part(tmp_path: Path) -> None:
    file = scratch(tmp_path)
    pieces = [file.write([bytes([number]) * 10]) for number in range(9)]
    del pieces[::2]
    written = [bytes(range(17)), bytes(range(20, 37)), bytes(range(40, 57))]
    piece = file.write(written)
    assert file.path.stat().st_size == 91
    assert parts(piece) == written
    assert [parts(piece) for piece in pieces] == [[bytes([number]) * 10] for number in (1, 3, 5, 7)]


def test_the_file_goes_with_all_that_know_it(tmp_path: Path) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    file = scratch(tmp_path)
    piece = file.write([b"some", b"more"])
    path = file.path
    assert path.name == BLOCKS
    del file
    assert parts(piece) == [b"some", b"more"]
    del piece
    assert not path.exists()
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.parametrize("part", [0, 1])
def test_a_changed_byte_is_refused_with_its_place_and_all_else_is_good(part: int, tmp_path: Path) -> None:
    file = scratch(tmp_path)
    before, piece, behind = (file.write([b"first", b"other"]) for _ in range(3))
    with file.path.open("r+b") as changed:
        changed.seek(10 + 5 * part + 2)
        changed.write(b"X")
    place = f"does not hold what was written at bytes {10 + 5 * part} to {15 + 5 * part}"
    with pytest.raises(StorageError, match=f"{file.path} {place}") as caught:
        parts(piece)
    assert "\n" not in str(caught.value)
    assert bytes(piece.read(1 - part)) == (b"first", b"other")[1 - part]
    assert parts(before) == parts(behind) == [b"first", b"other"]


def test_of_a_file_that_is_cut_the_front_is_good(tmp_path: Path) -> None:
    file = scratch(tmp_path)
    first, second = file.write([b"first"]), file.write([b"other"])
    os.truncate(file.path, 7)
    assert parts(first) == [b"first"]
    with pytest.raises(StorageError, match="at bytes 5 to 10"):
        parts(second)
    assert parts(file.write([b"third"])) == [b"third"]


def test_zeros_where_a_piece_was_are_refused(tmp_path: Path) -> None:
    file = scratch(tmp_path)
    piece = file.write([b"first"])
    os.truncate(file.path, 0)
    os.truncate(file.path, 5)
    with pytest.raises(StorageError, match="does not hold"):
        parts(piece)


def test_what_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = scratch(tmp_path)
    piece = file.write([b"first"])

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        with pytest.raises(StorageError, match=r"cannot be read \(Input/output error\) at bytes 0 to 5"):
            parts(piece)
    assert parts(piece) == [b"first"]


def test_reads_and_writes_that_end_early_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may do less than it was asked for."""
    file, read, write = scratch(tmp_path), os.preadv, os.pwrite

    def read_little(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return read(descriptor, [buffers[0][:3]], offset)

    def write_little(descriptor: int, data: memoryview, offset: int) -> int:
        return write(descriptor, data[:4], offset)

    monkeypatch.setattr(os, "preadv", read_little)
    monkeypatch.setattr(os, "pwrite", write_little)
    written = random_parts(random.Random(0))
    assert parts(file.write(written)) == written


def test_on_a_full_disk_a_piece_takes_nothing(tmp_path: Path) -> None:
    file = scratch(tmp_path)
    first, second = file.write([b"first"]), file.write([b"x" * 40])
    del second
    with files_of_at_most(30), pytest.raises(StorageError, match="cannot be written: File too large") as caught:
        file.write([b"y" * 60])
    assert "\n" not in str(caught.value)
    assert file.path.stat().st_size <= 30
    assert parts(first) == [b"first"]
    assert parts(file.write([b"y" * 60])) == [b"y" * 60]  # there is room again
    assert file.path.stat().st_size == 65


def test_an_interrupted_write_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = scratch(tmp_path)
    first = file.write([b"first"])

    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", interrupt)
        with pytest.raises(KeyboardInterrupt):
            file.write([b"x" * 40])
    gc.collect()
    second = file.write([b"other"])
    assert file.path.stat().st_size == 10
    assert [parts(first), parts(second)] == [[b"first"], [b"other"]]


def test_a_process_that_was_forked_reads_and_writes_nothing(tmp_path: Path) -> None:
    file = scratch(tmp_path)
    piece = file.write([b"first"])
    child = os.fork()
    if child == 0:
        good = parts(piece) == [b"first"]
        try:
            file.write([b"other"])
        except StorageError:
            os._exit(0 if good else 1)
        os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert parts(piece) == [b"first"]


def test_a_folder_that_cannot_be_made_is_refused() -> None:
    with pytest.raises(StorageError, match="no folder can be made in /proc"):
        scratch(Path("/proc"))
