"""Defaults of a user's own in a file: one list for all commands, any setting, and which model where."""

from __future__ import annotations

import logging
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from statekv.cli.options import LOADING, variable
from statekv.config import METHODS, SETTINGS
from statekv.config.spelling import check_name
from statekv.errors import ConfigError

FILE = Path("statekv.toml")  # of the current folder, where no other is named

# Whether a checkpoint's code is run is said each time: a file may have come with a folder of somebody else's.
KNOWN = [*SETTINGS, "method", *(name for name in LOADING if name != "trust_remote_code")]

_log = logging.getLogger(__name__)


def read_defaults(path: Path | None) -> dict[str, Any]:
    """What the user's file says, checked: the one named, or that of the current folder if there is one.

    Raises:
        ConfigError: the file cannot be read, or something in it is unknown or out of its range.
    """
    place = path or FILE
    if path is None and not place.is_file():
        return {}
    try:
        found = tomllib.loads(place.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{place} cannot be read: {(error.strerror or '').lower()}", "name another file") from None
    except ValueError as error:  # no TOML, or no text at all
        raise ConfigError(f"{place} is no TOML: {error}", "write lines such as budget = 2048") from None
    for name, value in found.items():
        _check(place, name, value)
    _log.info("%s: %s", place, ", ".join(found) or "empty")
    return found


def offered(command: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """What click takes for the defaults of a command, or of all those of a group: of each what it has."""
    if hasattr(command, "commands"):
        return {name: offered(each, values) for name, each in command.commands.items()}
    names = [each.name for each in command.params if each.envvar == variable(each.name)]
    return {name: values[name] for name in names if name in values}


def _check(place: Path, name: str, value: Any) -> None:
    if name not in KNOWN:
        near = get_close_matches(name, KNOWN, 3) or KNOWN
        raise ConfigError(f"{place} has {name!r}, which is no setting", f"known: {', '.join(near)}")
    try:
        if name in SETTINGS:
            SETTINGS[name].kind.read(name, value)
        elif name == "method":
            check_name(name, value, tuple(METHODS))
        elif not isinstance(value, str):
            raise ConfigError(f"{name} is {value!r}, but must be a string", f'write {name} = "…"')
    except ConfigError as error:
        raise ConfigError(f"{place}: {error.message}", error.hint) from None
