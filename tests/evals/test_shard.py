"""Shares of the work: disjoint, together everything; as given or as a launcher says."""

from __future__ import annotations

import pytest

from statekv.errors import ConfigError
from statekv.evals.shard import Shard


@pytest.mark.parametrize("count", [1, 2, 3, 11])
def test_shards_are_disjoint_and_everything(count: int) -> None:
    parts = [list(Shard(index, count).of(range(10))) for index in range(count)]
    assert sorted(thing for part in parts for thing in part) == list(range(10))
    assert all(part == sorted(part) for part in parts)


def test_as_the_command_line_has_it() -> None:
    assert Shard.parse("1/3") == Shard(1, 3)


@pytest.mark.parametrize("text", ["", "1", "1/", "a/2", "-1/2", "1/2/3", " 0/2", "0/2\n", "٠/٢"])
def test_what_is_no_shard(text: str) -> None:
    with pytest.raises(ConfigError, match="must be two numbers"):
        Shard.parse(text)


@pytest.mark.parametrize("text", ["2/2", "0/0"])
def test_a_shard_that_is_not_there(text: str) -> None:
    with pytest.raises(ConfigError, match="counts from 0"):
        Shard.parse(text)


def test_as_a_launcher_has_it() -> None:
    assert Shard.launched({"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}) == Shard(2, 4)
    assert Shard.launched({}) == Shard(0, 1)
    with pytest.raises(ConfigError):
        Shard.launched({"RANK": "4", "WORLD_SIZE": "4"})
