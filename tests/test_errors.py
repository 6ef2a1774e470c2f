"""One family of errors, each in one line with the way out."""

from __future__ import annotations

import copy
import pickle

import pytest

from statekv import errors
from statekv.errors import StateKVError

KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, Warning)
]


def test_all_kinds_are_one_family() -> None:
    assert len(KINDS) >= 6
    assert all(issubclass(kind, StateKVError) for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_hint_follows_the_message(kind: type[StateKVError]) -> None:
    error = kind("budget is 0", "raise budget")
    assert str(error) == "budget is 0 (raise budget)"
    assert (error.message, error.hint) == ("budget is 0", "raise budget")


def test_without_a_hint_the_message_stands_alone() -> None:
    error = StateKVError("broken")
    assert str(error) == "broken"
    assert error.hint == ""


@pytest.mark.parametrize("kind", KINDS)
def test_survives_copies_and_pickles(kind: type[StateKVError]) -> None:
    error = kind("budget is 0", "raise budget")
    for twin in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert type(twin) is kind
        assert (str(twin), twin.message, twin.hint) == (str(error), error.message, error.hint)


def test_warnings_are_not_errors() -> None:
    assert issubclass(errors.VideoWarning, UserWarning)
    assert not issubclass(errors.VideoWarning, StateKVError)
