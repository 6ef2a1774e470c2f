"""One family of errors, each in one line with the way out."""

from __future__ import annotations

import copy
import errno
import pickle
from importlib import import_module
from pathlib import Path

import pytest

from statekv import errors
from statekv.errors import ConfigError, OutputError, StateKVError, need, writing

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


def test_an_optional_package_that_is_missing_says_how_to_install_it() -> None:
    with pytest.raises(ConfigError) as told, need("there_is_none", "eval", "x.parquet is a Parquet file"):
        import_module("there_is_none")
    assert told.value.message == (
        "x.parquet is a Parquet file, but the package there_is_none does not load: No module named 'there_is_none'"
    )
    assert told.value.hint == "pip install 'statekv[eval]'"
    with pytest.raises(ConfigError, match=r"^the package there_is_none does not load"), need("there_is_none", "gpu"):
        import_module("there_is_none")


def test_an_optional_package_that_is_there_is_imported_and_other_errors_pass() -> None:
    with need("json", "eval"):
        import json
    assert json.loads("1") == 1
    with pytest.raises(ZeroDivisionError), need("json", "eval"):
        _ = 1 / 0


@pytest.mark.parametrize(
    ("value", "told"),
    [(3, "a whole number"), (0.5, "a number"), ("x", "a text"), (None, "None"), (True, "a bool"), ([], "a list")],
)
def test_what_something_is_has_words_and_an_article(value: object, told: str) -> None:
    assert errors.kind_of(value) == told
    assert errors.kind_of(errors.OutputError("full")) == "an OutputError"


def test_what_cannot_be_written_whole_is_not_left(tmp_path: Path) -> None:
    path = tmp_path / "new" / "picture.png"

    def save() -> None:
        with writing(path):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left")

    with pytest.raises(OutputError, match=r"picture.png cannot be written: no space left \(make room"):
        save()
    assert not path.exists()


def test_a_file_that_cannot_even_be_opened_stays(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(b"mine")
    with pytest.raises(OutputError, match="permission denied"), writing(path):
        raise PermissionError(errno.EACCES, "Permission denied")
    assert path.read_bytes() == b"mine"
