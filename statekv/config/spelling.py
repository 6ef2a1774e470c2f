"""Methods by name: `static(threshold=0.1)`, or `package.module:Class` for one of the user's own, and back."""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Iterable, Mapping
from importlib import import_module
from operator import attrgetter
from typing import Any

from statekv.errors import ConfigError, StateKVError

_SPELLING = re.compile(r"\s*(?P<name>\w+|[\w.]+:[\w.<>]+)\s*(?P<call>\(.*\))?\s*", re.DOTALL)
_SEPARATE = re.compile(r",(?![^(]*\))")  # package.module:Class(one=1,two=2) is one
_OWN = re.compile(r":(?=\w+=)")
_HOW_TO_SPELL = "write name, name(parameter=value) or package.module:Class(parameter=value)"


def read_named(spelling: str, table: Mapping[str, Any], what: str) -> tuple[str, dict[str, Any]]:
    """Name and parameters of a method as a setting spells it; nothing is imported.

    Args:
        spelling: a name of the table or `package.module:Class`, with `(parameter=literal, …)` behind it or without.

    Raises:
        ConfigError: it cannot be read, or the name is unknown.
    """
    found = _SPELLING.fullmatch(spelling)
    try:
        if found is None:
            raise ValueError
        call = ast.parse(f"_{found['call'] or '()'}", mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)) or call.args:
            raise ValueError
        parameters = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (ValueError, SyntaxError):
        raise ConfigError(f"{what} is {spelling!r}, which cannot be read", _HOW_TO_SPELL) from None
    if ":" not in found["name"]:
        check_name(what, found["name"], [*table, "package.module:Class"])
    return found["name"], parameters


def split_methods(written: Iterable[str]) -> list[str]:
    """`statekv,random:sinks=0` → each of them once, in their order."""
    parts = (part.strip() for text in written for part in _SEPARATE.split(text))
    return list(dict.fromkeys(parts))


def read_method(written: str) -> tuple[str, dict[str, Any]]:
    """`statekv:decay=0.9` → the method's name and settings of its own; a ConfigError where these are none, or a budget,
    which several methods share.
    """
    method, given, rest = written.partition(":")
    settings = {}
    for text in _OWN.split(rest) if given else ():
        name, _, value = text.partition("=")
        if not value or name == "budget":
            rule = f"{text!r} in {written} is no setting of a method"
            raise ConfigError(rule, "write statekv:decay=0.9; what is carried has an option of its own")
        try:
            settings[name] = json.loads(value.lower())  # numbers, true, false, null
        except ValueError:
            settings[name] = value
    return method, settings


def load_named(spelling: object, table: Mapping[str, str | type[Any]], what: str, kind: type[Any]) -> Any:
    """An instance of the method that a setting spells, or the object that it holds.

    Only subclasses of `kind` are called, so that a spelling from a file cannot call anything else.

    Args:
        spelling: see `read_named`; an instance of `kind` is returned as it is.
        table: classes by name, or where they are: `package.module:Class`.

    Raises:
        ConfigError: it cannot be read or found, is no `kind`, or does not take such parameters.
    """
    if not isinstance(spelling, str):
        if not isinstance(spelling, kind):
            rule = f"{what} is {_one_line(repr(spelling))}, but must be a {kind.__name__}"
            raise ConfigError(rule, f"give an instance of a subclass of {kind.__module__}.{kind.__name__}, or its name")
        return spelling
    name, parameters = read_named(spelling, table, what)
    found = _class_at(table.get(name, name), f"{what} is {spelling!r}")
    if not (isinstance(found, type) and issubclass(found, kind)):
        rule = f"{what} is {spelling!r}, which is no {kind.__name__}"
        raise ConfigError(rule, f"derive it from {kind.__module__}.{kind.__name__}")
    try:
        inspect.signature(found).bind(**parameters)
    except TypeError as error:
        known = ", ".join(inspect.signature(found).parameters) or "it has none"
        raise ConfigError(f"{what} is {spelling!r}: {error}", f"parameters: {known}") from None
    try:
        return found(**parameters)
    except StateKVError:
        raise
    except Exception as error:
        why = "" if isinstance(error, (TypeError, ValueError)) else f"{type(error).__name__}: "
        rule = f"{what} is {spelling!r}, which {found.__name__} refuses: {why}{_one_line(str(error))}"
        raise ConfigError(rule, "give it other parameters") from error


def spell(method: object, table: Mapping[str, str | type[Any]]) -> str:
    """What `load_named` makes an equal instance of; parameters are attributes of their own names.

    Raises:
        ConfigError: a parameter that the instance does not keep, or that is no literal; an instance without a hash.
    """
    kind = type(method)
    try:
        hash(method)
    except TypeError as error:
        rule = f"{kind.__name__} has no hash, so that streams cannot be told apart by it: {_one_line(str(error))}"
        raise ConfigError(rule, "make its class a frozen dataclass, its parameters tuples in place of lists") from None
    place = f"{kind.__module__}:{kind.__qualname__}"
    name = next((name for name, known in table.items() if known in (kind, place)), place)
    parameters = []
    try:
        expected = inspect.signature(kind).parameters
    except ValueError:
        rule = f"{method!r} is neither a name nor an object that does such work"
        raise ConfigError(rule, f"known: {', '.join(table)}, package.module:Class") from None
    for parameter in expected:
        try:
            value = getattr(method, parameter)
            if ast.literal_eval(repr(value)) != value:
                raise ValueError
        except (AttributeError, ValueError, SyntaxError):
            rule = f"{kind.__name__} does not keep its parameter {parameter!r} as a number, string, list or the like"
            raise ConfigError(rule, "keep it in an attribute of the same name, so that a save can note it") from None
        parameters.append(f"{parameter}={value!r}")
    return f"{name}({', '.join(parameters)})"


def _class_at(place: str | type[Any], told: str) -> Any:
    if not isinstance(place, str):
        return place
    module, name = place.split(":")
    try:
        return attrgetter(name)(import_module(module))
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise ConfigError(f"{told}, but {module} needs {error.name}", "install it") from None
        raise ConfigError(f"{told}, but there is no module {error.name}", "install it, or set PYTHONPATH") from None
    except AttributeError:
        raise ConfigError(f"{told}, but {module} has no {name}", "look into the module") from None
    except Exception as error:
        rule = f"{told}, but {module} cannot be imported: {type(error).__name__}: {_one_line(str(error))}"
        raise ConfigError(rule, "mend the module") from error


def _one_line(text: str) -> str:
    return " ".join(text.split())


def check_name(what: str, value: object, known: tuple[str, ...] | list[str]) -> None:
    """Raise a ConfigError that lists the known names unless `value` is one of them."""
    if not isinstance(value, str) or value not in known:
        raise ConfigError(f"unknown {what} {value!r}", f"known: {', '.join(known)}")
