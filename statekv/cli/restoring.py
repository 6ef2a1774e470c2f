"""What `--restore` means: a session as it was opened, on the model that it was opened with."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

import statekv
from statekv.config import Config
from statekv.errors import ConfigError

if TYPE_CHECKING:
    from statekv.engine.engine import Engine

LOADING = ("dtype", "device", "device_map", "revision", "trust_remote_code")
_STAYS = ("method", "stream")


def typed_options(context: typer.Context) -> set[str]:
    """Names of the options on the command line, all others having their defaults."""
    sources = ((name, context.get_parameter_source(name)) for name in context.params)
    return {name for name, source in sources if source is not None and source.name == "COMMANDLINE"}


def load_again(folder: Path, given: Mapping[str, Any], typed: Collection[str]) -> tuple[str, Engine]:
    """The model that a folder names, with what was typed in place of it.

    Args:
        folder: a saved session.
        given: every option's value.
        typed: names of those on the command line.

    Returns:
        The model's name, and the engine to restore the session on.

    Raises:
        ConfigError: an option that a session has once and for all, unless it is the method that it has.
        SaveError: the folder holds no session.
        ModelError: the model cannot be loaded.
    """
    from statekv.cache.folder import read_folder

    saved = read_folder(folder)
    with saved.reading():
        for name in sorted(set(_STAYS) & set(typed)):
            if name == "method" and Config(**saved.facts["stream"]["config"]).method == given["method"]:
                continue  # one command line for every start names it each time
            rule = f"--{name} was given with --restore, but a session stays as it was opened"
            raise ConfigError(rule, f"leave --{name} out, or watch the video again")
        then = saved.facts["model"]
        name = given["model"] if "model" in typed else then["name"]
        kept = {"dtype"} if "model" in typed else {"dtype", "revision"}
        loading = {name: given[name] for name in LOADING} | {name: then[name] for name in kept - set(typed)}
    if not name:
        raise ConfigError(f"{saved.folder} was saved with a model that has no name", "say where it is with --model")
    return name, statekv.load(name, **loading)
