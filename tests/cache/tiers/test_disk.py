"""Steps lie in one file, which they can leave one by one, and which goes with the last of them."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch

from statekv.cache.tiers.disk import DiskTier
from statekv.cache.tiers.rows import rows_of
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
