"""Steps lie in one file, which they can leave one by one, and which goes with the last of them."""

from __future__ import annotations

import copy
import gc
import os
import random
import threading
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from statekv.cache.tiers.base import rows_of
from statekv.cache.tiers.disk import BLOCKS, DiskTier, FreeList, Piece, Span, SpillDir, SpillFile
from statekv.errors import StorageError
from tests.cache.test_folder import files_of_at_most

LENGTHS = [2, 3]
ROWS = rows_of(LENGTHS)
Block = list[dict[str, torch.Tensor]]


def block() -> Block:
    return [{"tokens": torch.randn(sum(LENGTHS), 2, 1, 1, 4)} for _ in range(2)]


def size_of_file(folder: Path) -> int:
    (path,) = folder.rglob("blocks")
    return path.stat().st_size


def test_nothing_is_written_before_a_block_is(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path)
    assert tier.size(block()) > 0
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_as_long_as_was_said(tmp_path: Path) -> None:
    tier, content = DiskTier(tmp_path), block()
    held = tier.put(content, ROWS)
    assert size_of_file(tmp_path) == held.nbytes == tier.size(content)


def test_the_room_of_a_step_that_goes_is_used_again_and_no_other_is_moved(tmp_path: Path) -> None:
    tier, content, other = DiskTier(tmp_path), block(), block()
    held, beside = tier.put(content, ROWS), tier.put(other, ROWS)
    before = size_of_file(tmp_path)
    thinned = tier.thin(held, ROWS, [1])
    assert thinned.steps[0] is held.steps[1]
    del held
    again = tier.put([{"tokens": layer["tokens"][:2]} for layer in content], rows_of([2]))
    assert size_of_file(tmp_path) == before
    for layer in range(2):
        assert torch.equal(thinned.content()[layer]["tokens"], content[layer]["tokens"][2:])
        assert torch.equal(again.content()[layer]["tokens"], content[layer]["tokens"][:2])
        assert torch.equal(beside.content()[layer]["tokens"], other[layer]["tokens"])


def test_the_folder_goes_with_the_tier_and_its_last_block(tmp_path: Path) -> None:
    tier, content = DiskTier(tmp_path), block()
    held = tier.put(content, ROWS)
    other = copy.copy(tier)
    del tier
    assert torch.equal(held.content()[1]["tokens"], content[1]["tokens"])
    del held
    assert [path.is_dir() for path in tmp_path.iterdir()] == [True]  # another stream writes there
    del other
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_was_forked_leaves_the_file_alone(tmp_path: Path) -> None:
    tier, content = DiskTier(tmp_path), block()
    held = tier.put(content, ROWS)
    child = os.fork()
    if child == 0:
        del held, tier
        os._exit(0)
    os.waitpid(child, 0)
    assert torch.equal(held.content()[0]["tokens"], content[0]["tokens"])


def test_two_tiers_of_one_folder_do_not_meet(tmp_path: Path) -> None:
    first, second, content = DiskTier(tmp_path), DiskTier(tmp_path), block()
    held, other = first.put(content, ROWS), second.put(block(), ROWS)
    del second, other
    assert torch.equal(held.content()[0]["tokens"], content[0]["tokens"])


def test_where_nothing_can_be_written_nothing_is_left(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path)
    held = tier.put(block(), ROWS)
    room = size_of_file(tmp_path) + 128 + 30  # for a step, and a part of the next
    with files_of_at_most(room), pytest.raises(StorageError, match="cannot be written") as caught:
        tier.put(block(), ROWS)
    assert "\n" not in str(caught.value)
    assert len(held.content()) == 2
    del caught
    tier.put(block(), ROWS)  # there is room again
    assert size_of_file(tmp_path) == 2 * held.nbytes


def test_a_damaged_step_is_refused_and_the_others_are_not(tmp_path: Path) -> None:
    tier, content = DiskTier(tmp_path), block()
    held, other = tier.put(content, ROWS), tier.put(block(), ROWS)
    (path,) = tmp_path.rglob("blocks")
    with path.open("r+b") as file:
        file.seek(held.steps[0].nbytes + 9)
        file.write(b"X")
    with pytest.raises(StorageError, match=f"{path} does not hold"):
        held.content()
    assert torch.equal(held.read(0, ROWS[0])["tokens"], content[0]["tokens"][:2])
    assert len(other.content()) == 2


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"disk_folder is .*nowhere, which does not exist"):
        DiskTier(tmp_path / "nowhere")


def scratch(folder: Path) -> SpillFile:
    return SpillFile(SpillDir(folder))


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


def test_two_threads_write_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, write = scratch(tmp_path), os.pwrite
    other, waited = threading.Thread(target=lambda: file.write([b"other"])), list[bool]()

    def slow(descriptor: int, data: memoryview, offset: int) -> int:
        if not waited:
            waited.append(True)
            other.start()
            other.join(0.1)
            waited.append(other.is_alive())
        return write(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", slow)
    piece = file.write([b"first"])
    other.join()
    assert waited == [True, True]
    assert parts(piece) == [b"first"]


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


@pytest.mark.parametrize("sizes", [(7,), (9, 10, 11), tuple(range(1, 60))], ids=["one", "three", "many"])
@pytest.mark.parametrize("seed", range(3))
def test_no_byte_is_given_twice_and_the_file_grows_only_when_it_is_full(sizes: tuple[int, ...], seed: int) -> None:
    draw, vacancies, most = random.Random(seed), FreeList(), 0
    held: list[list[Span]] = []
    for _ in range(1500):
        if held and draw.random() < 0.5:
            vacancies.give(held.pop(draw.randrange(len(held))))
        else:
            size = draw.choice(sizes)
            held.append(vacancies.take(size))
            assert sum(stop - start for start, stop in held[-1]) == size
            assert all(start < stop for start, stop in held[-1])
        taken = sorted(span for spans in held for span in spans)
        assert all(before[1] <= after[0] for before, after in pairwise(taken))
        now = sum(stop - start for start, stop in taken)
        most = max(most, now)
        assert max((stop for _, stop in taken), default=0) <= vacancies.end <= most
    assert most > 5 * max(sizes)
    for spans in held:
        vacancies.give(spans)
    assert vacancies.end == 0


def test_pieces_of_one_size_are_never_cut() -> None:
    draw, vacancies = random.Random(0), FreeList()
    held = [vacancies.take(7) for _ in range(100)]
    for _ in range(1000):
        vacancies.give(held.pop(draw.randrange(len(held))))
        held.append(vacancies.take(7))
        assert len(held[-1]) == 1
    assert vacancies.end == 700


def test_the_smallest_span_that_has_room_is_used() -> None:
    vacancies = FreeList()
    spans = [vacancies.take(size) for size in (5, 1, 9, 1, 7, 1)]
    for number in (0, 2, 4):
        vacancies.give(spans[number])
    assert vacancies.take(6) == [(16, 22)]
    assert vacancies.take(9) == [(6, 15)]


def test_where_no_span_has_room_several_do_and_then_the_end() -> None:
    vacancies = FreeList()
    spans = [vacancies.take(size) for size in (5, 1, 9, 1)]
    for number in (0, 2):
        vacancies.give(spans[number])
    assert vacancies.take(20) == [(6, 15), (0, 5), (16, 22)]


def test_neighbours_become_one_and_the_end_comes_back() -> None:
    vacancies = FreeList()
    first, second, third, last = (vacancies.take(4) for _ in range(4))
    vacancies.give(first)
    vacancies.give(third)
    vacancies.give(second)
    assert vacancies.take(12) == [(0, 12)]
    vacancies.give(last)
    assert vacancies.end == 12
    assert vacancies.take(0) == []
