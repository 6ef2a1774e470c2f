"""The house rules that a parser can hold, over the whole tree at once; who imports whom is in .importlinter."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
HOUSE, TESTS = ROOT / "statekv", ROOT / "tests"
FILES = sorted(
    file for folder in (HOUSE, TESTS, ROOT / "training", ROOT / "benchmarks") for file in folder.rglob("*.py")
)
PACKAGE = [file for file in FILES if file.is_relative_to(HOUSE)]

IN_THE_ROOT = {"__init__", "__main__", "errors"}
BAD_NAMES = {"utils", "util", "common", "core", "types", "helpers", "misc", "base_types"}
MOST_FILES_OF_A_FOLDER = 12
MOST_LINES_OF_A_FUNCTION, MOST_LINES_OF_MOST_FUNCTIONS = 60, 20
# A file is as long as its idea; from here on it is looked at, and what was found to be one idea stands below.
MANY_LINES_OF_A_FILE = 500
LONG = {
    "statekv/config/__init__.py": 700,  # every setting, declared once
    "tests/config/test_config.py": 580,
}

# Tests of what several files of a room do together. The folders of tests without a room are named as they like.
OF_A_ROOM = {
    "cli": {"errors", "process", "save"},
    "engine": {"fork", "live", "threads"},
    "models": {"demo_model", "tiny"},
    "models/families": {"public_sizes"},
    ".": {"house", "package", "wrong_inputs"},
}


def test_only_these_lie_in_the_root() -> None:
    assert {file.stem for file in HOUSE.glob("*.py")} == IN_THE_ROOT


def test_a_folder_can_be_taken_in_at_a_glance() -> None:
    sizes = {folder: len(list(folder.glob("*.py"))) for folder in {file.parent for file in FILES}}
    assert not {_name(folder): size for folder, size in sizes.items() if size > MOST_FILES_OF_A_FOLDER}


def test_long_files_are_one_idea() -> None:
    lengths = {_name(file): len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert not {name: n for name, n in lengths.items() if n > LONG.get(name, MANY_LINES_OF_A_FILE)}
    assert not {name for name in LONG if lengths.get(name, 0) <= MANY_LINES_OF_A_FILE}, "no longer long"


def test_functions_are_short() -> None:
    sizes = [(_lines(node), f"{_name(file)}: {node.name}") for file in FILES for node in _functions(_tree(file))]
    assert not [(size, name) for size, name in sizes if size > MOST_LINES_OF_A_FUNCTION]
    assert sorted(sizes)[int(0.9 * len(sizes))][0] <= MOST_LINES_OF_MOST_FUNCTIONS


def test_every_file_says_what_it_is_for() -> None:
    """But for what marks a folder of tests as a package."""
    assert not _where(lambda tree: tree.body and not ast.get_docstring(tree), FILES)
    assert not [_name(file) for file in PACKAGE if not ast.get_docstring(_tree(file))]


def test_names_say_something() -> None:
    assert not [_name(file) for file in FILES if set(file.relative_to(ROOT).with_suffix("").parts) & BAD_NAMES]


def test_only_the_command_line_prints() -> None:
    """Everyone else returns, yields, warns or raises."""
    others = [file for file in PACKAGE if not file.is_relative_to(HOUSE / "cli")]
    assert not _where(lambda tree: any(_is_print(node) for node in ast.walk(tree)), others)


def test_imports_are_absolute() -> None:
    assert not _where(lambda tree: any(getattr(node, "level", 0) for node in ast.walk(tree)), FILES)


def test_every_package_has_its_door() -> None:
    """What is neither torch nor of Python's library is imported where a contract of .importlinter says."""
    contracts = ConfigParser()
    contracts.read(ROOT / ".importlinter", encoding="utf-8")
    doors = {package for part in contracts.values() for package in part.get("protected_modules", "").split()}
    known = {"torch", *doors, *sys.stdlib_module_names}
    assert not {(_name(file), name) for file in PACKAGE for name in _imported(_tree(file)) if name not in known}


def test_every_test_has_its_file() -> None:
    """tests/models/test_x.py tests statekv/models/x.py; what a file needs in parts is test_x_and_more.py."""
    strays = []
    for file in (file for file in FILES if file.name.startswith("test_") and file.is_relative_to(TESTS)):
        room, name = file.parent.relative_to(TESTS), file.stem.removeprefix("test_")
        known = {room.name, *OF_A_ROOM.get(room.as_posix(), ())} | {path.stem for path in (HOUSE / room).glob("*.py")}
        if (HOUSE / room).is_dir() and not any(name == stem or name.startswith(f"{stem}_") for stem in known):
            strays.append(_name(file))
    assert not strays


def _name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _where(rule: Callable[[ast.Module], object], files: list[Path]) -> list[str]:
    """The files of whose trees something holds."""
    return [_name(file) for file in files if rule(_tree(file))]


def _is_print(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"


def _imported(tree: ast.Module) -> Iterator[str]:
    """Names of packages, also of those that are imported in a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def _lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function, without its docstring."""
    first = function.body[0]
    documented = ast.get_docstring(function) is not None
    skipped = (first.end_lineno or first.lineno) - first.lineno + 1 if documented else 0
    return (function.end_lineno or function.lineno) - function.lineno + 1 - skipped
