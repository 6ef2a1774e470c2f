"""A folder of JSON and safetensors that goes from one whole save to the next at once; never pickle."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from statekv.errors import SaveError

FORMAT = 5  # changes whenever what is written means something else
_READABLE = (4, FORMAT)  # those that can be gone on with to the bit
FACTS = "session.json"
_PART = re.compile(r"(?:tokens-\d+|block-\d+|layer-\d+|passages|steps|frames|memories)\.(\d+)\.safetensors")
_FILE = {"name": (str,), "sha256": (str,), "bytes": (int,)}
_UNFINISHED = f"{FACTS}.part"
_CHUNK = 1 << 20  # bytes
_LOCK = "lock"  # held by who writes, and gone with it
_PATIENCE_SECONDS = 10.0
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Piece:
    """What becomes one file.

    Attributes:
        tensors: contiguous; asked for when the file is to be written.
        digest: SHA-256 of a file that holds just these tensors; None: there may be none.
    """

    name: str
    tensors: Callable[[], dict[str, torch.Tensor]]
    digest: str | None = None


@dataclass(frozen=True)
class Saved:
    """What a folder holds: facts, and name, SHA-256 and bytes of each piece's file; the tensors are still on disk."""

    folder: Path
    facts: dict[str, Any]
    files: dict[str, dict[str, Any]]

    def part(self, name: str) -> dict[str, torch.Tensor]:
        """Tensors of one piece, on the CPU; a SaveError where its file is missing or not as it was written."""
        with self.reading():
            known = self.files[name]
            path = self.folder / known["name"]
            if not _PART.fullmatch(known["name"]) or not path.is_file():
                raise _damaged(self.folder, f"its file {known['name']} is missing")
            if _digest(path) != known["sha256"]:
                raise _damaged(self.folder, f"its file {known['name']} is not as it was written")
            return load_file(path)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Whatever does not fit together in here is the folder's fault."""
        try:
            yield
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            raise _damaged(self.folder, f"what it holds does not fit together ({type(error).__name__})") from None


def write_folder(folder: str | os.PathLike[str], facts: Mapping[str, Any], pieces: Iterable[Piece]) -> dict[str, str]:
    """Write a save, into a folder that is made where there is none; one that it holds already is replaced once this one
    is whole.

    New files come beside those of the former save; a piece that one of those holds already is not written again.
    Replacing `session.json`, which names the files that count, is one operation of the file system: whenever the
    process dies, the folder holds the former save or this one. Files that neither names are removed here and by the
    next write. Who writes has a lock meanwhile; another one waits some seconds for it.

    Args:
        pieces: taken one by one, so that the tensors of no more than one have to be in memory.

    Returns:
        SHA-256 of each piece's file.

    Raises:
        SaveError: the folder cannot be written, holds something else, or another process is writing it for long; a
            former save in it is intact.
    """
    target, made = _place(folder), False
    try:
        check_target(target)
        made = not target.exists()
        target.mkdir(parents=True, exist_ok=True)
        with _held(target):
            return _write(target, facts, pieces)
    except (OSError, SafetensorError) as error:
        told = getattr(error, "strerror", None) or str(error)
        hint = "make room, or name another folder; what was saved there before is intact"
        raise SaveError(f"{target} cannot be written: {told.splitlines()[0]}", hint) from None
    finally:
        if made:
            with suppress(OSError):  # it holds something, and stays
                target.rmdir()


def _write(target: Path, facts: Mapping[str, Any], pieces: Iterable[Piece]) -> dict[str, str]:
    serial = 1 + max((int(found[1]) for path in target.iterdir() if (found := _PART.fullmatch(path.name))), default=0)
    try:
        former = _former(target)
        files: dict[str, dict[str, Any]] = {}
        for piece in pieces:
            path = target / f"{piece.name}.{serial}.safetensors"
            files[piece.name] = former.get(piece.digest) or _write_part(path, piece.tensors())
        _publish(target, {**facts, "files": files})
    finally:
        _sweep(target)
    return {name: file["sha256"] for name, file in files.items()}


@contextmanager
def _held(target: Path) -> Iterator[None]:
    """Have the folder's lock, which the system lets go of where a process is killed; a SaveError where somebody else
    keeps it.
    """
    if os.name != "posix":
        yield
        return
    lock = _lock(target / _LOCK)
    try:
        yield
    finally:
        with suppress(OSError):
            (target / _LOCK).unlink()  # while it is held: who waits for it sees that it is gone, and makes another
        os.close(lock)


def _lock(path: Path) -> int:
    """The descriptor of a lock file that this process holds now, and that says so."""
    until = time.monotonic() + _PATIENCE_SECONDS
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            taken = _taken(lock)
            if taken and os.fstat(lock).st_nlink:
                os.ftruncate(lock, 0)
                os.write(lock, f"{os.getpid()}\n".encode())
                return lock
            if not taken and time.monotonic() > until:
                holder = os.pread(lock, 64, 0).decode(errors="replace").strip() or "unknown"
                rule = f"process {holder} has been saving to {path.parent} for {_PATIENCE_SECONDS:g} s"
                raise SaveError(rule, "wait for its end, or name another folder")
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
        time.sleep(_POLL_SECONDS)


def _taken(lock: int) -> bool:
    import fcntl  # not on every system

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks: as good as it gets
    return True


def _place(folder: str | os.PathLike[str]) -> Path:
    """Raise a SaveError for what cannot be the path of a folder."""
    if not isinstance(folder, (str, os.PathLike)):
        raise SaveError(f"the folder is {folder!r}, but must be a path", "name a folder")
    try:
        os.stat(path := Path(folder))
    except FileNotFoundError:
        return path
    except (OSError, ValueError, TypeError) as error:
        told = getattr(error, "strerror", None) or error
        raise SaveError(f"{str(folder)[:80]!r} cannot be the path of a folder: {told}", "name another one") from None
    return path


def check_target(folder: str | os.PathLike[str]) -> None:
    """Raise the SaveError that writing to a folder would raise because of what is there: nothing of it is ours."""
    target = _place(folder)
    if target.exists() and not target.is_dir():
        raise SaveError(f"{target} is a file, not a folder", "name another one")
    found = list(target.iterdir()) if target.exists() else []
    guests = [path for path in found if not _ours(path)]
    if guests and not (_readable(target) or [path.name for path in guests] == [FACTS] != [path.name for path in found]):
        raise SaveError(f"{target} holds other files than a saved session", "name another folder, or an empty one")


def read_folder(folder: str | os.PathLike[str]) -> Saved:
    """Read what a folder says; its tensors are read and checked part by part.

    Raises:
        SaveError: there is no such folder, or no save in it, or one that is damaged or of another format.
    """
    source = _place(folder)
    if not (source / FACTS).is_file():
        found = "is not a folder" if source.exists() else "does not exist"
        problem = "holds no saved session" if source.is_dir() else found
        raise SaveError(f"{source} {problem}", "name a folder that session.save or --save wrote")
    try:
        facts = json.loads((source / FACTS).read_text(encoding="utf-8"))
        found, check, files = facts.pop("format"), facts.pop("check", None), facts.get("files")
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        raise _damaged(source, f"{FACTS} cannot be read") from None
    if found not in _READABLE:
        rule = f"{source} was saved in format {found!r}, this version reads {FORMAT}"
        raise SaveError(rule, "watch the video again, or use the version that saved it")
    if check != _check(facts) or not _are_files(files):
        raise _damaged(source, f"{FACTS} is not as it was written")
    return Saved(source, facts, facts.pop("files"))


def _are_files(files: Any) -> bool:
    entries = list(files.values()) if isinstance(files, dict) else [files]
    return all(isinstance(file, dict) and file.keys() >= _FILE.keys() and fits(file, _FILE) for file in entries)


def fits(value: Any, form: Any) -> bool:
    """Whether JSON has a form: a tuple of types, a list of one form, or a dict of forms, each may be missing."""
    if isinstance(form, dict):
        found = {} if value is None else value
        return isinstance(found, dict) and all(fits(found[name], form[name]) for name in form if name in found)
    if isinstance(form, list):
        return isinstance(value, list) and all(fits(each, form[0]) for each in value)
    return type(value) in form


def _readable(folder: Path) -> bool:
    try:
        read_folder(folder)
    except SaveError:
        return False
    return True


def _former(target: Path) -> dict[str | None, dict[str, Any]]:
    """Files of the save that counts, by what is in them; without those that are plainly damaged."""
    if not _readable(target):
        return {}
    found: dict[str | None, dict[str, Any]] = {}
    for file in read_folder(target).files.values():
        path = target / file["name"]
        if _PART.fullmatch(file["name"]) and path.is_file() and path.stat().st_size == file["bytes"]:
            found[file["sha256"]] = file
    return found


def _ours(path: Path) -> bool:
    return bool(_PART.fullmatch(path.name)) or path.name in (_UNFINISHED, _LOCK)


def _write_part(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    save_file(tensors, path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return {"name": path.name, "sha256": _digest(path), "bytes": path.stat().st_size}


def _publish(target: Path, facts: dict[str, Any]) -> None:
    unfinished = target / _UNFINISHED
    with unfinished.open("w", encoding="utf-8") as file:
        json.dump({"format": FORMAT, "check": _check(facts), **facts}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync(target)
    os.replace(unfinished, target / FACTS)
    _sync(target)


def _sync(folder: Path) -> None:
    """Names too survive a power cut, where the system has a way to ask for that."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _sweep(target: Path) -> None:
    """Remove files of ours that do not count."""
    named: set[str] = set()
    if (target / FACTS).exists():
        try:
            named = {file["name"] for file in read_folder(target).files.values()}
        except SaveError:
            return  # of a newer version, or damaged: nobody knows which of its files count
    for path in list(target.iterdir()):
        if _ours(path) and path.name not in (*named, _LOCK):
            path.unlink()


def _check(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def _damaged(folder: Path, problem: str) -> SaveError:
    return SaveError(f"{folder} is damaged: {problem}", "use an older copy, or watch the video again")


# Of one file. A save writes the open part at the end anew, so that is what it may write too much; twice as much would
# halve the number of files.
PART_BYTES = 16 << 20


@dataclass(frozen=True)
class Part:
    """Consecutive tokens of a cache, in every layer; the tensors are read when they are needed."""

    first: int
    stop: int
    tensors: Callable[[], dict[str, torch.Tensor]]


@dataclass
class Written:
    """Which files hold which tokens just as they are now.

    Files are known by what is in them, not by where they lie: so a fork, or two sessions restored from one folder, can
    share them, and whoever writes to another folder writes all of it.
    """

    _found: dict[tuple[int, int], str] = field(default_factory=dict)  # first and stop → SHA-256; in order

    def digest(self, first: int, stop: int) -> str | None:
        """SHA-256 of a file with these tokens; None: nobody knows of any."""
        return self._found.get((first, stop))

    def note(self, found: dict[tuple[int, int], str]) -> None:
        """Know these files, by first token and end, and no others."""
        self._found = dict(sorted(found.items()))

    def forget(self, first: int) -> None:
        """From this token on they do not count any more: keys there have changed, or others will come."""
        while self._found and next(reversed(self._found))[1] > first:
            self._found.popitem()

    def copy(self) -> Written:
        """What a fork knows: its tokens are the same up to here."""
        return Written(dict(self._found))


def tokens_of_part(bytes_per_token: int) -> int:
    """Tokens of a part, but for the last one.

    One size, and no merging of small parts into large ones: no token is written again once its part is whole, no save
    takes longer than the others, and files grow in number with the stream, 64 for a GiB.
    """
    return max(1, -(-PART_BYTES // bytes_per_token))
