"""The one exception family that users see: what is wrong, with which value, and the way out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

_SETTING = re.compile(r"`([a-z_]+)`")


class StateKVError(Exception):
    """Anything a user can mend.

    Settings may be named in backquotes. They are shown without; elsewhere a setting may have another spelling.

    Args:
        message: the value and the rule it breaks, in one line.
        hint: the way out, in one line; printed after the message.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        self._written = message, hint
        self.message, self.hint = (_SETTING.sub(r"\1", text) for text in self._written)
        super().__init__(f"{self.message} ({self.hint})" if hint else self.message)

    def spelled(self, spell: Callable[[str], str]) -> Self:
        """The same error, each setting's name as `spell` has it."""
        return type(self)(*(_SETTING.sub(lambda found: spell(found[1]), text) for text in self._written))


class ConfigError(StateKVError):
    """A setting outside its range, or two settings that contradict each other."""


class VideoError(StateKVError):
    """A source that cannot be opened or holds no usable video."""


class ModelError(StateKVError):
    """A checkpoint that cannot be loaded, or inputs that do not belong to it."""


class HorizonError(StateKVError):
    """The stream would pass the positions that the rotary frequencies were scaled for."""


class MemoryLimitError(StateKVError):
    """The device ran out of memory."""


class PolicyError(StateKVError):
    """A policy of the user's own that fails, or answers with something that cannot be used."""


class SaveError(StateKVError):
    """A session that cannot be written, or a folder that cannot be read as one."""


class OutputError(StateKVError):
    """Standard output, or a file beside it, that cannot be written."""


class StorageError(StateKVError):
    """A file or folder of the tier on disk that cannot be written or read."""


class VideoWarning(UserWarning):
    """Something about the video that the user should know, but that does not stop the work."""


class StorageWarning(UserWarning):
    """Something has happened to the tiers of a stream's memory, which goes on without what is lost."""


class SpeedWarning(UserWarning):
    """Something that makes the work slower than it could be, but not wrong."""


_KINDS = {int: "a whole number", float: "a number", str: "a text", type(None): "None", bytes: "a bytes object"}


def kind_of(value: object) -> str:
    """What kind of thing a value is, for an error: a whole number, a dict, an Image."""
    name = type(value).__name__
    return _KINDS.get(type(value), f"an {name}" if name[0] in "aeiouAEIOU" else f"a {name}")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around what writes a file anew, its folder made: where it cannot be written, no part of it is left. A file that
    was there, and that could not even be opened, stays.

    Raises:
        OutputError: it cannot be written.
    """
    before = _changed_at(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if path.is_file() and _changed_at(path) != before:
            path.unlink(missing_ok=True)
        told = (error.strerror or str(error)).lower()
        raise OutputError(f"{path} cannot be written: {told}", "make room, or name another place") from None


def _changed_at(path: Path) -> int | None:
    """In nanoseconds; None where there is no file."""
    with suppress(OSError):
        return path.stat().st_mtime_ns
    return None


@contextmanager
def need(package: str, extra: str, why: str = "") -> Iterator[None]:
    """Around the imports of an optional package: without it, what to install is said.

    Args:
        package: its name.
        extra: of statekv, that brings it.
        why: what cannot be done without it.

    Raises:
        ConfigError: the package is not there, or does not load.
    """
    try:
        yield
    except ImportError as error:
        reason = f"the package {package} does not load: {error}"
        raise ConfigError(f"{why}, but {reason}" if why else reason, f"pip install 'statekv[{extra}]'") from None


def explained(error: Exception) -> Exception:
    """The error of a failed import, or what to do about it where a broken torchvision is behind it."""
    cause: BaseException | None = error
    while cause is not None:
        if "torchvision" in str(cause):
            return ModelError(
                "the installed torchvision does not fit the installed torch, so that transformers cannot be imported",
                "statekv does not need it: pip uninstall torchvision, or install the build that matches torch",
            )
        cause = cause.__cause__ or cause.__context__
    return error
