"""Faults put one by one into a copy of the package: which of them does a test find?

    python -m tests.mutants --only cache/carried.py --sample 20

Run by hand, on a system that can fork. A fault that was found by other means is named here and always tried; all others
are made from the code, and drawn with a seed. First the tests of a file run once and tell which functions each of them
calls, so that a fault is shown only to those that call its function, the quickest first, up to the first that fails.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType

import pytest

import tests
from tests.mutants.mutations import function_at, mutations
from tests.mutants.tables import BESIDE, EQUIVALENT, NAMED, SILENT

ROOT = Path(__file__).parent.parent.parent
TAKEN_ALONG = ("statekv", "tests", "pyproject.toml")
ROOMS = ("cache", "runner", "ops", "video/sampling.py", "video/clock.py")
# Once for all children; of the package itself nothing, for each child has another one.
LOADED_BEFORE = (
    *("torch._dynamo", "torchvision.transforms.v2.functional", "matplotlib", "av", "safetensors.torch"),
    *(f"transformers.models.{name}" for name in ("internvl.modeling_internvl", "qwen3_vl.modeling_qwen3_vl")),
    "transformers.models.auto.processing_auto",
)
SPARE_SECONDS, SPARE_TIMES = 30.0, 5.0  # beyond what the tests take without a fault


@dataclass(frozen=True)
class Mutant:
    """A fault in a file of the package.

    Attributes:
        path: of the file, as cache/carried.py.
        line: of the file as it is, the first that changes.
        source: the whole file with the fault.
        old, new: what reads otherwise, in one line each.
    """

    path: str
    line: int
    source: str
    old: str
    new: str

    @property
    def equivalent(self) -> bool:
        """Whether it changes nothing that could be seen."""
        silent = any(text in self.new and text not in self.old for text in SILENT)
        return silent or (self.path, self.new) in EQUIVALENT


Reached = dict[str, tuple[float, set[tuple[str, int]]]]  # by test: seconds, and functions by file and first line


@dataclass
class Reach:
    """A plugin of pytest that notes which functions of the package each test calls.

    Attributes:
        package: its folder.
        found: so far.
    """

    package: str
    found: Reached = field(default_factory=dict)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        began, called = time.monotonic(), set[tuple[str, int]]()

        def note(frame: FrameType, *_: object) -> None:
            if frame.f_code.co_filename.startswith(self.package):
                called.add((frame.f_code.co_filename, frame.f_code.co_firstlineno))

        threading.settrace(note)  # type: ignore[arg-type]
        sys.settrace(note)  # type: ignore[arg-type]
        try:
            return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]
            self.found[item.nodeid] = time.monotonic() - began, called


class Copy:
    """A copy of the package and its tests in which faults may be made.

    Args:
        root: an empty folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in TAKEN_ALONG:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, root)
        self._reach: dict[tuple[str, ...], Reached] = {}
        self._written = 0

    def survives(self, mutant: Mutant) -> bool:
        """Whether no test fails with the fault."""
        path = self.root / "statekv" / mutant.path
        whole = path.read_text(encoding="utf-8")
        # Tests beside those of the file take longer, and are asked last.
        for tests_of in (own_tests(mutant.path), tests_beside(mutant.path)):
            chosen, seconds = self._reaching(mutant, tests_of)
            try:
                self._write(path, mutant.source)
                if chosen and self._run(chosen, SPARE_SECONDS + SPARE_TIMES * seconds):
                    return False
            finally:
                self._write(path, whole)
        return True

    def _reaching(self, mutant: Mutant, tests_of: Sequence[str]) -> tuple[list[str], float]:
        """Tests that call a mutant's function, all of them where none does, and the seconds that they take."""
        if not tests_of:
            return [], 0.0
        key, path = tuple(tests_of), self.root / "statekv" / mutant.path
        function = str(path), function_at(path.read_text(encoding="utf-8"), mutant.line)
        if key not in self._reach:
            plugin = Reach(str(self.root / "statekv"))
            if self._run(tests_of, 3600.0, plugin):
                raise SystemExit(f"{' '.join(tests_of)} fail without a fault")
            self._reach[key] = plugin.found
        found = self._reach[key]
        reaching = {test: took for test, (took, called) in found.items() if function in called}
        if not reaching:  # a constant of the module, or what only another process runs
            reaching = {test: took for test, (took, _) in found.items()}
        return sorted(reaching, key=reaching.__getitem__), sum(reaching.values())

    def _run(self, chosen: Sequence[str], limit_seconds: float, plugin: Reach | None = None) -> bool:
        """Run tests in a child, up to the first that fails; whether one did, or they took too long."""
        receives, sends = multiprocessing.Pipe(duplex=False)
        child = multiprocessing.get_context("fork").Process(target=_asked, args=(self.root, chosen, plugin, sends))
        child.start()
        sends.close()
        code, found = None, {}
        with suppress(EOFError):  # it was killed
            if receives.poll(limit_seconds):
                code, found = receives.recv()
        with suppress(ProcessLookupError):
            os.killpg(child.pid or 0, signal.SIGKILL)  # whatever it has started
        child.join()
        if plugin is not None:
            plugin.found = found
        return bool(code != 0)

    def _write(self, path: Path, text: str) -> None:
        """With a time of its own, or Python might take the compiled file of another fault for this one's."""
        path.write_text(text, encoding="utf-8")
        self._written += 1
        os.utime(path, (self._written, self._written))


def _asked(root: Path, chosen: Sequence[str], plugin: Reach | None, sends: Connection) -> None:
    os.setsid()
    silence = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silence, stream)
    code: int | None = None
    try:
        plugins = [] if plugin is None else [plugin]
        code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *chosen], plugins))
    finally:
        sends.send((code, {} if plugin is None else plugin.found))


def own_tests(path: str) -> list[str]:
    """The tests of a file of the package: tests/cache/test_x.py and test_x_and_more.py for cache/x.py."""
    file = Path(path)
    place, name = ROOT / "tests" / file.parent, file.parent.name if file.stem == "__init__" else file.stem
    found = [*place.glob(f"test_{name}.py"), *place.glob(f"test_{name}_*.py")]
    return sorted(str(test.relative_to(ROOT)) for test in found)


def tests_beside(path: str) -> list[str]:
    """Others that hold what the file does, by the longest beginning of its path that is listed."""
    beginnings = [beginning for beginning in BESIDE if path.startswith(beginning)]
    beside = BESIDE[max(beginnings, key=len)] if beginnings else ()
    return [f"tests/{name}" for name in beside if f"tests/{name}" not in own_tests(path)]


def named(only: str) -> list[Mutant]:
    """Faults that were found by other means."""
    found = []
    for path, old, new in NAMED:
        text = (ROOT / "statekv" / path).read_text(encoding="utf-8")
        if text.count(old) != 1:
            raise SystemExit(f"{path} holds {text.count(old)} times, and not once: {old}")
        first = text[: text.index(old)].count("\n") + 1
        found.append(Mutant(path, first, text.replace(old, new), old.strip(), new.strip()))
    return [mutant for mutant in found if mutant.path.startswith(only)]


def generated(only: str) -> list[Mutant]:
    """Faults made from the code of the rooms."""
    package = ROOT / "statekv"
    files = [
        file for room in ROOMS for file in ([package / room] if "." in room else sorted((package / room).rglob("*.py")))
    ]
    found = []
    for file in files:
        path, text = file.relative_to(package).as_posix(), file.read_text(encoding="utf-8")
        if path.startswith(only):
            found += [Mutant(path, *mutation) for mutation in mutations(text)]
    return found


def main() -> None:
    """The command."""
    told = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    told.add_argument("--only", default="", metavar="PATH", help="files whose path in the package begins so")
    told.add_argument("--sample", type=int, metavar="N", help="faults drawn of those made from the code; default: all")
    told.add_argument("--seed", type=int, default=0, help="of the draw")
    options = told.parse_args()
    made = generated(options.only)
    if options.sample is not None:
        made = random.Random(options.seed).sample(made, min(options.sample, len(made)))
    mutants = sorted([*named(options.only), *made], key=lambda mutant: (mutant.path, mutant.line))
    with tempfile.TemporaryDirectory() as folder:
        report(mutants, _prepared(Path(folder)))


def _prepared(root: Path) -> Copy:
    """A copy of the package from which this process and its children import from now on."""
    copy = Copy(root)
    os.chdir(root)
    sys.path[0] = os.environ["PYTHONPATH"] = str(root)
    tests.__path__[:] = [str(root / "tests")]
    for module in LOADED_BEFORE:
        with suppress(ImportError):
            importlib.import_module(module)
    assert "statekv" not in sys.modules
    return copy


def report(mutants: Sequence[Mutant], copy: Copy) -> None:
    """Try all of them; print who survives, and the share that is killed."""
    every, killed = Counter[str](), Counter[str]()
    for mutant in mutants:
        if mutant.equivalent:
            continue
        room = str(Path(mutant.path).parent)
        every[room] += 1
        if copy.survives(mutant):
            print(f"{mutant.path}:{mutant.line}\n  - {mutant.old}\n  + {mutant.new}", flush=True)
        else:
            killed[room] += 1
    for room, count in sorted(every.items()):
        print(f"{room}: {killed[room]} of {count} killed")
    share, equal = killed.total() / max(1, every.total()), len(mutants) - every.total()
    print(f"all: {killed.total()} of {every.total()} killed ({share:.1%}), {equal} more change nothing")


if __name__ == "__main__":
    main()
