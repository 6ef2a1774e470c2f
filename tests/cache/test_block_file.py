"""Any rows of a block file come back as they were written; damage is named, and what is whole stays usable."""

from __future__ import annotations

import errno
import json
import os
import resource
import struct
import zlib
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from statekv.cache import block_file as subject
from statekv.cache.block_file import BlockFile, block_bytes, is_block, open_block, write_block
from statekv.errors import StorageError

FACTS = {"steps": [[0, 257], [257, 514]], "times": [0.1 + 0.2, None], "name": "ü"}


def layers(rows: int = 514, number: int = 3) -> list[dict[str, torch.Tensor]]:
    """Codes of 384 bytes a row (21 of them to a CRC), and what belongs to them."""
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "codes": torch.randint(256, (rows, 2, 1, 3, 64), dtype=torch.uint8, generator=generator),
            "scale": torch.randn(-(-rows // 32), 2, 1, 3, 64, generator=generator).half(),
            "tokens": torch.randn(rows, 2, 1, 3, 40, generator=generator).bfloat16(),
        }
        for _ in range(number)
    ]


@pytest.fixture
def written(tmp_path: Path) -> BlockFile:
    return write_block(tmp_path, "0007", FACTS, layers())


def test_all_of_it_comes_back(written: BlockFile) -> None:
    assert (written.path.name, written.facts) == ("0007.block", FACTS)
    for file in (written, open_block(written.path)):
        for layer, tensors in enumerate(layers()):
            for name, tensor in tensors.items():
                found = file.read(layer, name, 0, len(tensor))
                assert found.dtype == tensor.dtype
                assert torch.equal(found, tensor)


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 1), (1, 514), (20, 22), (21, 42), (22, 41), (513, 514)])
def test_any_rows_come_back(written: BlockFile, start: int, stop: int) -> None:
    for layer, tensors in enumerate(layers()):
        for name in ("codes", "tokens"):
            assert torch.equal(written.read(layer, name, start, stop), tensors[name][start:stop])


def test_rows_larger_than_a_chunk(tmp_path: Path) -> None:
    tensor = torch.randn(5, 300, 100)
    file = write_block(tmp_path, "wide", {}, [{"x": tensor}])
    assert torch.equal(file.read(0, "x", 2, 4), tensor[2:4])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.bool])
def test_every_dtype_and_any_layout(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.randint(-9, 9, (3, 4, 5)).to(dtype).transpose(0, 2)  # [5, 4, 3], not contiguous
    file = write_block(tmp_path, "x", {}, [{"a": tensor[1:], "b": tensor[:0]}, {}])
    assert torch.equal(file.read(0, "a", 0, 4), tensor[1:])
    assert file.read(0, "b", 0, 0).shape == (0, 4, 3)


def test_rows_are_a_copy(written: BlockFile) -> None:
    found = written.read(0, "codes", 0, 4)
    found.zero_()
    assert torch.equal(written.read(0, "codes", 0, 4), layers()[0]["codes"][:4])
    written.remove()
    assert not found.any()


def test_bytes_are_those_of_the_formula(written: BlockFile) -> None:
    nothing_in_it = [{name: tensor.to("meta") for name, tensor in layer.items()} for layer in layers()]
    assert written.nbytes == written.path.stat().st_size == block_bytes(FACTS, nothing_in_it)
    tensors = sum(tensor.nbytes for layer in layers() for tensor in layer.values())
    assert tensors < written.nbytes < 1.002 * tensors


def test_the_format_is_as_documented(written: BlockFile) -> None:
    """docs/tiers.md, read by hand."""
    data = written.path.read_bytes()
    magic, version, length, check = struct.unpack_from("<8s3I", data)
    assert (magic, version) == (b"statekv\n", 1)
    text = data[20 : 20 + length]
    assert zlib.crc32(text) == check
    told = json.loads(text)
    assert told["facts"] == FACTS
    offset, checks = 20 + length, []
    for layer, tensors in zip(told["layers"], layers(), strict=True):
        for name, (dtype, shape) in layer.items():
            tensor = tensors[name]
            assert (getattr(torch, dtype), tuple(shape)) == (tensor.dtype, tensor.shape)
            offset = -(-offset // 64) * 64
            raw = data[offset : offset + tensor.nbytes]
            assert torch.equal(torch.frombuffer(bytearray(raw), dtype=tensor.dtype).view(tensor.shape), tensor)
            row = tensor[0].nbytes
            size = max(1, 8192 // row) * row
            checks += [zlib.crc32(raw[start : start + size]) for start in range(0, len(raw), size)]
            offset += tensor.nbytes
    assert data[offset:] == struct.pack(f"<{len(checks)}I", *checks)


def test_files_of_one_shape_remember_it_once(tmp_path: Path) -> None:
    first, second = (write_block(tmp_path, name, {"n": 1}, layers(9)) for name in "ab")
    assert first.spots is second.spots


# Nothing stays open


def test_nothing_stays_open_or_mapped(tmp_path: Path) -> None:
    file = write_block(tmp_path, "big", {}, [{"x": torch.ones(1 << 13, 1 << 10, dtype=torch.uint8)}] * 4)
    of_another = replace(file, checks=array("I", [0] * len(file.checks)))
    before = len(os.listdir("/proc/self/fd")), resident_of_files()
    for layer in range(4):
        assert file.read(layer, "x", 0, 1 << 13).all()
        with pytest.raises(StorageError):
            of_another.read(layer, "x", 0, 1 << 13)
    assert str(file.path) not in Path("/proc/self/maps").read_text()
    after = len(os.listdir("/proc/self/fd")), resident_of_files()
    assert after[0] == before[0]
    assert after[1] - before[1] < 4 << 20  # of 32 MiB that were mapped


def resident_of_files() -> int:
    """Bytes of mapped files that this process has in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile"))


# Damage


def offset_of(file: BlockFile, layer: int, name: str, row: int) -> int:
    spot = file.spots[layer][name]
    return spot.offset + row * spot.row


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("row", [0, 20, 21, 513])
def test_a_flipped_bit_is_found_where_it_is_and_nowhere_else(written: BlockFile, row: int) -> None:
    flip(written.path, offset_of(written, 1, "codes", row))
    for start in range(514):
        shares_a_check = start // 21 == row // 21
        if not shares_a_check:
            written.read(1, "codes", start, start + 1)
        elif start % 5 == 0:
            with pytest.raises(StorageError, match="does not hold what was written"):
                written.read(1, "codes", start, start + 1)
    for layer in (0, 2):
        assert torch.equal(written.read(layer, "codes", 0, 514), layers()[layer]["codes"])


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def _prolong(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


@pytest.mark.parametrize(
    ("damage", "problem"),
    [(_cut, r"has \d+ bytes instead of \d+"), (_prolong, r"has \d+ bytes instead of"), (Path.unlink, "is missing")],
)
def test_a_file_that_is_not_as_it_was_is_named(
    written: BlockFile, damage: Callable[[Path], None], problem: str
) -> None:
    damage(written.path)
    for use in (lambda: written.read(0, "scale", 0, 1), lambda: open_block(written.path)):
        with pytest.raises(StorageError, match=f"0007.block {problem}") as caught:
            use()
        assert "\n" not in str(caught.value)
        assert "all others are not" in caught.value.hint


@pytest.mark.parametrize(
    ("offset", "problem"), [(0, "is no block"), (8, "is no block of format 1"), (30, "does not begin as it was")]
)
def test_a_damaged_head_is_found(written: BlockFile, offset: int, problem: str) -> None:
    flip(written.path, offset)
    with pytest.raises(StorageError, match=problem):
        open_block(written.path)


@pytest.mark.parametrize("text", [b"", b"statekv\n", b"<html>404</html>" * 20])
def test_what_is_no_block_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "x.block").write_bytes(text)
    with pytest.raises(StorageError, match="is no block"):
        open_block(tmp_path / "x.block")


# Writes


def test_where_no_more_can_be_written_nothing_is_left(tmp_path: Path) -> None:
    """The system refuses to write on, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(StorageError, match=r"0007.block cannot be written: File too large") as caught:
            write_block(tmp_path, "0007", FACTS, layers())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("moment", ["_write", "replace"])
def test_a_write_that_fails_leaves_what_was_there(
    written: BlockFile, monkeypatch: pytest.MonkeyPatch, error: BaseException, moment: str
) -> None:
    original = subject._write

    def fail(file: Any, *rest: Any) -> NoReturn:
        if moment == "_write":
            original(file, *rest)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os if moment == "replace" else subject, moment, fail)
        with pytest.raises((StorageError, KeyboardInterrupt)):
            write_block(written.path.parent, "0007", {}, layers(5))
    assert [path.name for path in written.path.parent.iterdir()] == ["0007.block"]
    assert torch.equal(written.read(0, "codes", 0, 514), layers()[0]["codes"])


def test_a_block_replaces_one_of_its_name(written: BlockFile) -> None:
    shorter = write_block(written.path.parent, "0007", {}, layers(5))
    assert torch.equal(shorter.read(0, "codes", 0, 5), layers(5)[0]["codes"])
    with pytest.raises(StorageError):
        written.read(0, "codes", 0, 5)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be written: No such file"):
        write_block(tmp_path / "gone", "x", {}, layers(5))


def test_removed_once_or_twice(written: BlockFile) -> None:
    written.remove()
    written.remove()
    assert list(written.path.parent.iterdir()) == []


def test_names_of_blocks() -> None:
    assert is_block("0007.block")
    assert is_block("0007.block.part")
    assert not is_block("0007.blocks")
    assert not is_block("block")
