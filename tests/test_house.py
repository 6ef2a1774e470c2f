"""The house rules, held by parsing every file: who may import whom, one door per package, sizes."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

import statekv

HOUSE = Path(statekv.__file__).parent

# Rooms from the ground up, and the rooms that each may use besides itself. A room is a folder or a file; a name with a
# dot, such as "video.frame", is one file of a room that is otherwise closed.
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "interrupts": set(),
    "turns": set(),
    "progress": {"video.status"},
    "memory": {"errors"},
    "drawing": {"errors"},
    "flops": set(),
    "capacity": {"errors"},
    "config": {"errors", "capacity"},
    # ground floor and side wing
    "ops": {"errors"},
    "video": {"errors"},
    # first floor
    "cache": {"errors", "capacity", "config", "ops"},
    # second floor
    "models": {"errors", "config", "ops", "cache", "turns", "video.frame"},
    # third floor: one loaded model …
    "decoding": {"errors"},
    "streaming_text": set(),
    "graphs": {"errors", "cache", "models.base"},
    "packing": {"ops", "cache", "models.base", "memory"},
    "admission": {"errors", "capacity", "cache", "memory"},
    "batches": {"config", "cache", "models.base"},
    "stepper": {
        *("errors", "config", "ops", "cache", "models", "memory"),
        *("decoding", "graphs", "packing", "admission", "batches", "turns"),
    },
    # … one stream …
    "ahead": {
        *("errors", "cache", "models.base", "memory", "interrupts", "progress", "video.frame", "video.live"),
    },
    "asking": {"errors", "cache", "models.base", "stepper", "decoding", "streaming_text", "video.frame"},
    "new_step": {"errors", "cache", "models.base", "stepper", "ahead", "memory", "video.frame"},
    "saving": {"errors", "config", "cache", "models.base", "models.identity", "progress", "video.frame"},
    "feed": {
        *("errors", "cache", "stepper", "ahead", "new_step", "saving"),
        *("progress", "video.frame", "video.live", "video.status"),
    },
    "session": {
        *("errors", "config", "cache", "models.base", "stepper", "decoding", "asking", "feed", "new_step", "saving"),
        *("turns", "interrupts", "progress", "video.frame", "video.live", "video.resume", "video.status"),
    },
    # … several …
    "together": {"errors", "cache", "models", "batches", "memory", "stepper", "video.frame"},
    "rounds": {"errors", "interrupts", "progress", "batches", "together", "stepper", "new_step", "session"},
    # … and the front doors
    "sources": {"errors", "config", "cache.folder", "video"},
    "engine": {"errors", "config", "cache", "models", "stepper", "saving", "session", "sources", "rounds", "video"},
    "dropin": {"errors", "config", "models", "memory", "stepper", "decoding"},
}
FRONT = {"errors", "capacity", "config", "drawing", "video", "cache.stream", "session", "engine", "dropin"}

# The roof: siblings that use the front doors and never each other.
ROOF: dict[str, set[str]] = {
    "demo": FRONT,
    "server": FRONT,
    # Several streams share one pass of the vision tower; the benchmark of our own is made of the demo world's films.
    "evals": FRONT | {"flops", "memory", "models.base", "stepper", "demo.world", "demo.film"},
    # The model of lmms-eval.
    "lmms": FRONT,
    # Looks into the carried cache.
    "analysis": FRONT | {"cache.carried", "models.base"},
    # Looks under the floors on purpose: it times the parts that a step and an answer are made of.
    "bench": FRONT | {"ops", "cache", "models", "stepper", "together", "decoding", "progress", "memory", "flops"},
}

# Only the command line reaches its siblings, and only inside its commands; it also lists models and kernels.
ROOMS |= ROOF | {
    "cli": FRONT | {"", "models", "ops", "progress", "interrupts", "cache.folder"} | set(ROOF),
    "__main__": {"cli"},
}
LAZY = {"cli": set(ROOF)}

# Third-party packages: everyone may use the standard library and torch's tensors where tensors are; the others have
# doors. None: anywhere. Otherwise the rooms, or single files, that may import it.
DOORS: dict[str, set[str] | None] = {
    "torch": None,
    "numpy": {"video", "demo", "evals", "analysis"},
    "av": {"video.track", "video.writer"},
    "safetensors": {"cache.folder", "models.loading"},
    "transformers": {"cache", "models", "decoding", "streaming_text", "dropin", "bench.build"},
    "triton": {"ops.flash"},
    "flash_attn": {"ops.plain"},
    "matplotlib": {"drawing", "demo.picture", "bench.picture", "evals.picture", "analysis.curves"},
    "PIL": {"analysis.canvas"},
    "huggingface_hub": {"evals.records"},
    "pyarrow": {"evals.records"},
    "lmms_eval": {"lmms"},
    "tqdm": {"lmms.model"},
    "typer": {"cli"},
    "rich": {"cli"},
}
WITHOUT_TORCH = {"__init__", "errors", "capacity", "config", "interrupts", "progress", "cli"}

BAD_NAMES = {"utils", "util", "common", "core", "types", "helpers", "misc", "base_types"}
MOST_LINES_OF_A_FILE = 300
MOST_LINES_OF_A_FUNCTION = 60

FILES = sorted(HOUSE.rglob("*.py"))
EVERY_FILE = pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(HOUSE)))


def module_of(file: Path) -> str:
    """`statekv/video/reader.py` → `video.reader`; a folder's `__init__` is the folder."""
    parts = file.relative_to(HOUSE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports_of(file: Path) -> Iterator[tuple[str, bool]]:
    """Full names of the modules that a file imports, also inside functions, and whether at the file's top.

    `from a.b import c` counts as `a.b.c` where that is a module, else as `a.b`. Imports for type checkers alone
    count as not at the top.
    """
    tree = ast.parse(file.read_text(encoding="utf-8"))
    at_top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names = [_module(node.module or "", alias.name) for alias in node.names]
        for name in names:
            yield name, id(node) in at_top


def _module(package: str, name: str) -> str:
    inside = HOUSE.parent.joinpath(*package.split("."), name)
    is_module = package.startswith("statekv") and (inside.is_dir() or inside.with_suffix(".py").is_file())
    return f"{package}.{name}" if is_module else package


def allows(rooms: set[str], module: str) -> bool:
    """Whether a module is, or lies in, one of some rooms."""
    return any(module == room or module.startswith(f"{room}.") for room in rooms)


def room_of(module: str) -> str:
    return module.split(".")[0]


@EVERY_FILE
def test_floors(file: Path) -> None:
    """Nobody imports upwards or sideways."""
    module = module_of(file)
    room = room_of(module)
    if room == "__init__":
        return  # names of the front doors, for type checkers; resolved at first use
    assert room in ROOMS, f"{module} is in no room of the table"
    for name, at_top in imports_of(file):
        if room_of(name) != "statekv":
            continue
        used = name.removeprefix("statekv").removeprefix(".")
        assert used or room == "cli", f"{module} imports the front of the house"
        assert not used or room_of(used) == room or allows(ROOMS[room], used), f"{module} may not use {used}"
        if at_top:
            assert not allows(LAZY.get(room, set()), used), f"{module} may use {used} only inside a command"


@EVERY_FILE
def test_doors(file: Path) -> None:
    """Each third-party package has its door."""
    module = module_of(file)
    for name, at_top in imports_of(file):
        package = room_of(name)
        if package in sys.stdlib_module_names or package == "statekv":
            continue
        assert package in DOORS, f"{module} imports {package}, which has no door"
        doors = DOORS[package]
        assert doors is None or allows(doors, module), f"{package} enters through {doors}, not through {module}"
        if package == "torch":
            assert not (at_top and allows(WITHOUT_TORCH, module)), f"{module} must do without torch"


@EVERY_FILE
def test_names_docstrings_and_sizes(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert ast.get_docstring(tree), f"{file} does not say what it is for"
    assert not set(file.relative_to(HOUSE).with_suffix("").parts) & BAD_NAMES
    assert len(text.splitlines()) <= MOST_LINES_OF_A_FILE
    for function in functions(tree):
        assert lines(function) <= MOST_LINES_OF_A_FUNCTION, f"{function.name} has {lines(function)} lines"


@EVERY_FILE
def test_only_the_command_line_prints(file: Path) -> None:
    """`print` belongs to the command line; everyone else returns, yields, warns or raises."""
    if room_of(module_of(file)) == "cli":
        return
    calls = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    assert not [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


def test_most_files_and_functions_are_short() -> None:
    texts = [file.read_text(encoding="utf-8") for file in FILES]
    assert median(len(text.splitlines()) for text in texts) <= 120
    sizes = sorted(lines(function) for text in texts for function in functions(ast.parse(text)))
    assert median(sizes) <= 14
    assert sizes[int(0.9 * len(sizes))] <= 40


def test_every_room_of_the_table_is_used_as_the_table_says() -> None:
    """A door that nobody uses is closed: the table says what is, not what might be."""
    built = {room_of(module_of(file)) for file in FILES}
    assert built - {"__init__"} <= set(ROOMS)
    used = {(room_of(name), module_of(file)) for file in FILES for name, _ in imports_of(file)}
    for package, doors in DOORS.items():
        for door in (doors or set()) - {"server", "ops.flash"}:
            assert any(name == package and allows({door}, module) for name, module in used), f"{package} at {door}"


def test_every_test_has_its_room() -> None:
    """tests/models/test_x.py tests statekv/models/x.py."""
    tests = Path(__file__).parent
    for folder in ("ops", "cache", "video", "models", "bench", "evals", "analysis"):
        for file in (tests / folder).glob("test_*.py"):
            name = file.stem.removeprefix("test_")
            known = {path.stem for path in (HOUSE / folder).glob("*.py")} | {folder}
            assert any(name == stem or name.startswith(f"{stem}_") for stem in known), file


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def lines(function: ast.FunctionDef) -> int:
    """Lines of a function, without its docstring."""
    documented = ast.get_docstring(function) is not None
    first = function.body[0]
    skipped = (first.end_lineno or first.lineno) - first.lineno + 1 if documented else 0
    return (function.end_lineno or function.lineno) - function.lineno + 1 - skipped
