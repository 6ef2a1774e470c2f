"""What an evaluation leaves behind: JSON lines, one file for each configuration and shard, which can be gone on with.

The first line is the header. For each video there follow a line for each of its questions and then one that closes the
video; or one that says why it failed. A video is written in one piece.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from statekv.errors import ConfigError

Line = Mapping[str, Any]

_PACKAGES = ("statekv", "torch", "transformers", "av")
_CLOSING = ("header", "video", "failed")  # lines behind which nothing is missing


def versions() -> dict[str, str]:
    """Of what answers depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Header:
    """Everything that tells one result file from another; the versions are those of when it was begun, a shard is as in
    `0/2`.
    """

    task: str
    variant: str
    model: str
    revision: str | None
    dtype: str
    device: str
    config: Mapping[str, Any]
    shard: str
    versions: Mapping[str, str] = field(default_factory=versions)

    def differences(self, other: Header) -> str:
        """Where two headers differ, in words; "" where they don't."""
        ours, theirs = _flat(asdict(self)), _flat(asdict(other))
        names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        return ", ".join(f"{name} {ours.get(name)!r} instead of {theirs.get(name)!r}" for name in names)


@dataclass
class Results:
    """A result file, read.

    Attributes:
        questions: rows of complete videos.
        videos: closing lines of complete videos, by the video's id.
        failed: why a video failed, by its id; those that a later try completed are not among them.
        length: bytes up to the last complete video.
    """

    path: Path
    header: Header
    questions: list[dict[str, Any]] = field(default_factory=list)
    videos: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    length: int = 0


def read(path: Path) -> Results:
    """Read a result file; an end that was cut off is left out. A ConfigError for what is none."""
    lines = _lines(path)
    end, first = next(lines, (0, {}))
    try:
        header = Header(**{name: value for name, value in first.items() if name != "type"})
    except TypeError:
        header = None
    if first.get("type") != "header" or header is None:
        raise ConfigError(f"{path} does not begin with the header of an evaluation", "name another file or folder")
    found = Results(path, header, length=end)
    try:
        _take(found, lines)
    except KeyError as error:
        raise ConfigError(f"{path} has a video without {error}", "move the file away to begin it anew") from None
    return found


def _take(found: Results, lines: Iterator[tuple[int, dict[str, Any]]]) -> None:
    waiting = []
    for end, line in lines:
        kind = line.get("type")
        if kind == "question":
            waiting.append(line)
        elif kind == "video":
            found.videos[line["video"]] = line
            found.questions += waiting
            found.failed.pop(line["video"], None)
        elif kind == "failed":
            found.failed[line["video"]] = line["reason"]
        if kind in _CLOSING:
            waiting, found.length = [], end


class ResultFile:
    """A result file that grows video by video.

    Args:
        path: made with the header where it is not there; otherwise gone on with.
        header: what the file must be about.

    Raises:
        ConfigError: a file of another configuration, unreadable, or a place that cannot be written to.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self.path = path
        self.done: set[str] = set()
        self.failed: dict[str, str] = {}
        try:
            self._open(header)
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}", "give another --out") from None

    def append(self, lines: Sequence[Line]) -> None:
        """Write one video's lines, the closing one last; all of them are on disk afterwards, or a ConfigError says why
        not.
        """
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        try:
            with self.path.open("ab") as file:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be written: {error.strerror}", "make room and resume") from None

    def _open(self, header: Header) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists() or b"\n" not in self.path.read_bytes():  # at most a header that was cut off
            self.path.write_bytes(b"")
            self.append([{"type": "header", **asdict(header)}])
            return
        found = read(self.path)
        if differences := header.differences(found.header):
            raise ConfigError(f"{self.path} is of another run: {differences}", "give another --out, or move it away")
        os.truncate(self.path, found.length)
        self.done, self.failed = set(found.videos), found.failed


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each whole line of a file, and the bytes up to its end."""
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} is not a file of results", "name a file, or a folder of them")
    try:
        with path.open("rb") as file:
            yield from _lines_of(path, file)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", "check the path") from None


_LONGEST_LINE = 16 << 20  # bytes


def _lines_of(path: Path, file: BinaryIO) -> Iterator[tuple[int, dict[str, Any]]]:
    end = 0
    for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE), b""), 1):
        if len(line) == _LONGEST_LINE:
            raise ConfigError(f"line {number} of {path} has no end", "name another file or folder")
        if not line.endswith(b"\n"):
            return  # the end of a line that was being written
        end += len(line)
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ConfigError(f"line {number} of {path} is not a JSON object", "move the file away to begin it anew")
        yield end, found


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{name} ") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


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
        """`0/2` is the first of two; a ConfigError for anything that is no such shard."""
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text, re.ASCII)
        if found is None:
            raise ConfigError(f"shard is {text!r}, but must be two numbers such as 0/2", "the first of two is 0/2")
        return cls(int(found[1]), int(found[2]))

    @classmethod
    def launched(cls, environment: Mapping[str, str] = os.environ) -> Shard:
        """What `accelerate launch` and `torchrun` have made of this process; alone, all of it. A ConfigError where
        their variables contradict each other.
        """
        return cls.parse(f"{environment.get('RANK', '0')}/{environment.get('WORLD_SIZE', '1')}")

    def of(self, things: Iterable[T]) -> Iterator[T]:
        """This shard's share of things in order."""
        return islice(things, self.index, None, self.count)


def file_name(configuration: str, shard: Shard) -> str:
    """Where a configuration's results of a share of the work lie in the folder of a run."""
    return f"{configuration}.{shard.index}-of-{shard.count}.jsonl"
