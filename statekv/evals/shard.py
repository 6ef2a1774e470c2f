"""Which part of a task this process does, where several share it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from statekv.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """Every `count`-th video, from the one with number `index` (from 0) on."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ConfigError(f"shard is {self.index}/{self.count}, but counts from 0", f"0/{self.count} is the first")

    @classmethod
    def parse(cls, text: str) -> Shard:
        """`0/2` is the first of two.

        Raises:
            ConfigError: not two numbers, or no such shard.
        """
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text, re.ASCII)
        if found is None:
            raise ConfigError(f"shard is {text!r}, but must be two numbers such as 0/2", "the first of two is 0/2")
        return cls(int(found[1]), int(found[2]))

    @classmethod
    def launched(cls, environment: Mapping[str, str] = os.environ) -> Shard:
        """What `accelerate launch` and `torchrun` have made of this process; alone, all of it.

        Raises:
            ConfigError: their variables contradict each other.
        """
        return cls.parse(f"{environment.get('RANK', '0')}/{environment.get('WORLD_SIZE', '1')}")

    def of(self, things: Iterable[T]) -> Iterator[T]:
        """This shard's share of things in order."""
        return islice(things, self.index, None, self.count)
