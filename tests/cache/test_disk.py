"""Files go with their blocks, the folder with its tier."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch

from statekv.cache.disk import DiskTier
from statekv.errors import StorageError
from tests.cache.test_folder import files_of_at_most

Block = list[dict[str, torch.Tensor]]


def block(tokens: int = 5) -> Block:
    return [{"tokens": torch.randn(tokens, 2, 1, 1, 4)}, {"tokens": torch.randn(tokens, 2, 1, 1, 4)}]


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.block*"))


def test_nothing_is_written_before_a_block_is(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path)
    assert tier.size(block()) > 0
    assert list(tmp_path.iterdir()) == []


def test_a_file_takes_what_was_said(tmp_path: Path) -> None:
    tier, content = DiskTier(tmp_path), block()
    held = tier.put(content)
    assert [path.stat().st_size for path in files(tmp_path)] == [held.nbytes] == [tier.size(content)]


def test_a_file_goes_with_the_last_who_knows_it(tmp_path: Path) -> None:
    tier, content = DiskTier(tmp_path), block()
    held, other = tier.put(content), tier.put(block())
    also = [held]
    del held
    assert len(files(tmp_path)) == 2
    assert torch.equal(also[0].read(0, "tokens", 0, 5), content[0]["tokens"])
    also.clear()
    assert len(files(tmp_path)) == 1
    assert torch.equal(other.read(1, "tokens", 2, 3), other.content()[1]["tokens"][2:3])


def test_a_process_that_was_forked_leaves_files_alone(tmp_path: Path) -> None:
    tier, content = DiskTier(tmp_path), block()
    held = tier.put(content)
    child = os.fork()
    if child == 0:
        del held, tier
        os._exit(0)
    os.waitpid(child, 0)
    assert torch.equal(held.content()[0]["tokens"], content[0]["tokens"])


def test_the_folder_goes_with_the_tier_and_its_last_block(tmp_path: Path) -> None:
    tier, content = DiskTier(tmp_path), block()
    held = tier.put(content)
    other = copy.copy(tier)
    del tier
    assert torch.equal(held.content()[1]["tokens"], content[1]["tokens"])
    del held
    assert [path.is_dir() for path in tmp_path.iterdir()] == [True]  # another stream writes there
    del other
    assert list(tmp_path.iterdir()) == []


def test_two_tiers_of_one_folder_do_not_meet(tmp_path: Path) -> None:
    first, second, content = DiskTier(tmp_path), DiskTier(tmp_path), block()
    held, other = first.put(content), second.put(block())
    del second, other
    assert torch.equal(held.content()[0]["tokens"], content[0]["tokens"])


def test_where_nothing_can_be_written_nothing_is_left(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path)
    held = tier.put(block())
    with files_of_at_most(100), pytest.raises(StorageError, match="cannot be written") as caught:
        tier.put(block())
    assert "\n" not in str(caught.value)
    assert len(files(tmp_path)) == 1
    assert len(held.content()) == 2
    tier.put(block())  # there is room again


def test_a_damaged_file_is_refused_and_removed_in_the_end(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path)
    held, other = tier.put(block()), tier.put(block())
    path, _ = files(tmp_path)
    path.write_bytes(path.read_bytes()[:-200] + bytes(200))
    with pytest.raises(StorageError, match=path.name):
        held.content()
    assert len(other.content()) == 2
    del held
    assert not path.exists()


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"disk_folder is .*nowhere, which does not exist"):
        DiskTier(tmp_path / "nowhere")
