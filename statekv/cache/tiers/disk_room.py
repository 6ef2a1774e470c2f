"""A private folder for the blocks that one stream has on disk; gone when the process is, however that ended."""

from __future__ import annotations

import os
import re
import stat
import tempfile
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from statekv.errors import StorageError

BLOCKS = "blocks"  # the file in the folder
_PREFIX = "statekv-"
_ROOM = re.compile(rf"{_PREFIX}[a-z0-9_]{{8}}")  # as `tempfile.mkdtemp` names folders
_LOCK = "lock"


class DiskRoom:
    """A folder that is made when it is first asked for and removed with the object, on `close` or when Python exits.

    A process that is killed cannot remove its folder. Therefore each one holds a lock, which the system lets go of
    whenever the process ends, and whoever makes a new one first removes those of the same parent that nobody holds.
    Nothing is ever removed but files of blocks, locks, and folders of that kind that are empty then; links stay.

    Args:
        parent: where the folder is made; None: the system's folder for temporary files.

    Raises:
        StorageError: the parent does not exist, or is no folder.
    """

    def __init__(self, parent: Path | None = None) -> None:
        self.parent = Path(tempfile.gettempdir()) if parent is None else parent.absolute()
        self._making = threading.Lock()
        self._folder: Path | None = None
        self._leave: weakref.finalize[[Path, int, int], DiskRoom] | None = None
        if not self.parent.is_dir():
            problem = "is not a folder" if self.parent.exists() else "does not exist"
            raise StorageError(f"disk_folder is {self.parent}, which {problem}", "make it, or name another one")

    @property
    def folder(self) -> Path:
        """The folder, made where there is none yet.

        Raises:
            StorageError: it cannot be made.
        """
        with self._making:
            if self._folder is None:
                with _writing(self.parent):
                    _sweep(self.parent)
                    self._folder, lock = _made(self.parent)
                self._leave = weakref.finalize(self, _leave, self._folder, lock, os.getpid())
            return self._folder

    def close(self) -> None:
        """Remove the folder with the file of blocks in it, if there is one."""
        if self._leave is not None:
            self._leave()
        self._folder = None


def _made(parent: Path) -> tuple[Path, int]:
    """A new folder, and the descriptor of its lock, held."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        lock = os.open(folder / _LOCK, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            if _locked(lock) and os.fstat(lock).st_nlink:
                return folder, lock
        except OSError:
            _remove(folder)
            os.close(lock)
            raise
        os.close(lock)  # somebody swept before it was locked


def _leave(folder: Path, lock: int, process: int) -> None:
    if os.getpid() == process:  # a fork of it has the object too, but not the folder
        _remove(folder)
        os.close(lock)


def _sweep(parent: Path) -> None:
    """Remove the folders that processes of this user have left behind."""
    with os.scandir(parent) as found:
        rooms = [Path(entry.path) for entry in found if _ROOM.fullmatch(entry.name) and _own_folder(entry)]
    for room in rooms:
        with suppress(OSError):  # no lock, or gone in the meantime: not ours to remove
            lock = os.open(room / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
            try:
                if stat.S_ISREG(os.fstat(lock).st_mode) and _locked(lock):
                    _remove(room)
            finally:
                os.close(lock)


def _own_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_uid == os.getuid()


def _remove(folder: Path) -> None:
    """Remove the file of blocks, and the folder with its lock where nothing else is left."""
    with suppress(OSError):
        blocks = folder / BLOCKS
        if blocks.is_file() and not blocks.is_symlink():
            blocks.unlink()
        if [path.name for path in folder.iterdir()] == [_LOCK]:
            os.unlink(folder / _LOCK)
            folder.rmdir()


def _locked(descriptor: int) -> bool:
    """Take the lock of an open file, unless another process has it."""
    import fcntl  # not on every system; one without it can do without this tier

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _writing(parent: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = "make it writable, or name another disk_folder"
        raise StorageError(f"no folder can be made in {parent}: {error.strerror}", hint) from None
