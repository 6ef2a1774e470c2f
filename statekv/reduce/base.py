"""What a reducer is, and what must be true of its work."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch

from statekv.errors import ConfigError, StateKVError, kind_of
from statekv.models.encoded import EncodedStep

# What a method remembers of a stream from step to step, by name: tensors, and what JSON holds.
Memory = dict[str, Any]


class Reducer(ABC):
    """Leaves out tokens of a step before it enters the language model, or changes what they say.

    A reducer keeps nothing itself, for one serves many streams: what it wants to know at the next step it puts into
    the memory, which belongs to the stream. Its parameters are attributes of their own names, as in a dataclass, so
    that a saved session can name it. Positions and labels of what is left are those of the whole picture.
    """

    @abstractmethod
    def reduce(self, step: EncodedStep, memory: Memory) -> EncodedStep:
        """What goes on of a step.

        Args:
            step: the tower's features, in the order in which steps enter; a copy, to be changed at will. Without
                frames where a processor made the pixels.
            memory: what this reducer has left there at the stream's last step, at first nothing; a copy as well,
                and what is in it afterwards is there at the next step. Forks, saves and steps that are taken back
                are none of its concern.

        Returns:
            At least one token: `step.keep(…)`, with other features if need be.
        """


def reduced(reducer: Reducer, step: EncodedStep, memory: Mapping[str, Any]) -> tuple[EncodedStep, Memory]:
    """Let a reducer work on copies, and check what it has done.

    Args:
        reducer: any.
        step: the tower's.
        memory: the stream's; it stays as it is.

    Returns:
        The step, and the stream's memory once it has entered.

    Raises:
        ConfigError: the reducer fails, or makes a step that cannot enter or a memory that could not be saved.
    """
    name = type(reducer).__name__
    own = replace(step, features=step.features.clone(), deepstack=tuple(layer.clone() for layer in step.deepstack))
    new = own_memory(memory)
    try:
        found = reducer.reduce(own, new)
    except ConfigError as error:
        raise ConfigError(f"reducer {name} failed: {error.message}", error.hint) from error
    except (StateKVError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"reducer {name} failed: {told}", "mend the reducer") from error
    _check_step(name, step, found)
    check_memory(f"reducer {name}", new)
    return found, new


def own_memory(memory: Mapping[str, Any]) -> Memory:
    """A copy that may be changed."""
    return {key: value.clone() if isinstance(value, torch.Tensor) else deepcopy(value) for key, value in memory.items()}


def check_memory(who: str, memory: Memory) -> None:
    """Raise a ConfigError that names `who` unless a save can hold what it remembers."""
    for key, value in memory.items():
        if not (isinstance(key, str) and (isinstance(value, torch.Tensor) or _is_json(value))):
            rule = f"{who} remembers {key!r} as {kind_of(value)}, which a save cannot hold"
            raise ConfigError(rule, "remember tensors, numbers, strings, lists and dicts under strings")


def _check_step(name: str, given: EncodedStep, found: object) -> None:
    if not isinstance(found, EncodedStep):
        raise ConfigError(f"reducer {name} returned {kind_of(found)}", "return step.keep(…)")
    if found.grid != given.grid or [*map(id, found.frames)] != [*map(id, given.frames)]:
        rule = f"reducer {name} returned a step with other frames, or a grid of {found.grid} for {given.grid}"
        raise ConfigError(rule, "return step.keep(…): kept says what is left of the grid")
    _check_places(name, given, found)
    n, hidden = len(found.places), given.features.shape[-1]
    layers = (found.features, *found.deepstack)
    if len(found.deepstack) != len(given.deepstack) or any(layer.shape != (n, hidden) for layer in layers):
        shapes = ", ".join(str(list(layer.shape)) for layer in layers)
        rule = f"reducer {name} returned features {shapes}, must be {1 + len(given.deepstack)} times {[n, hidden]}"
        raise ConfigError(rule, "return step.keep(…), which chooses from all of them alike")
    if any(bool(layer.isnan().any()) for layer in layers) and not bool(given.features.isnan().any()):
        raise ConfigError(f"reducer {name} returned features that are not numbers (NaN)", "look for a division by zero")


def _check_places(name: str, given: EncodedStep, found: EncodedStep) -> None:
    kept = found.kept
    if kept is None:
        return
    if kept.dtype != torch.int64 or kept.ndim != 1 or kept.device.type != "cpu":
        rule = f"reducer {name} returned kept as {kept.dtype} {list(kept.shape)} on {kept.device.type}"
        raise ConfigError(rule, "must be int64 [n] on the CPU, as step.keep(…) makes it")
    if not len(kept):
        raise ConfigError(f"reducer {name} left no token of a step", "keep at least one: the step's time hangs on it")
    if bool((kept.diff() <= 0).any()) or not 0 <= int(kept[0]) <= int(kept[-1]) < given.total:
        rule = f"reducer {name} returned kept {_shortened(kept)}, must be ascending and below {given.total}"
        raise ConfigError(rule, "return step.keep(…) with ascending numbers, or with a mask")


def _shortened(kept: torch.Tensor) -> str:
    numbers = [str(number) for number in kept[:8].tolist()]
    return f"[{', '.join(numbers)}{', …' if len(kept) > 8 else ''}]"


def _is_json(value: object) -> bool:
    if isinstance(value, list):
        return all(map(_is_json, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(each) for key, each in value.items())
    return value is None or isinstance(value, (bool, int, float, str))
