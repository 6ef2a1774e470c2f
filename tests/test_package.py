"""Importing statekv costs nothing and changes nothing."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import statekv

ROOT = Path(__file__).parent.parent


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_imports_neither_torch_nor_transformers() -> None:
    heavy = ("torch", "transformers", "numpy", "av", "PIL", "matplotlib", "typer", "rich")
    assert run(f"import sys, statekv; print([name for name in {heavy!r} if name in sys.modules])") == "[]"


def test_settings_and_the_command_line_need_no_torch() -> None:
    """So that help, versions and bad input are told at once."""
    commands = [f"statekv.cli.{file.stem}" for file in (Path(statekv.__file__).parent / "cli").glob("[a-z]*.py")]
    light = ["statekv.config", "statekv.errors", "statekv.engine.interrupts", *commands]
    code = f"""
import importlib, sys
for name in {light!r}:
    importlib.import_module(name)
    assert "torch" not in sys.modules, name
"""
    assert run(code) == ""


def test_importing_everything_leaves_transformers_as_it_was() -> None:
    """Nothing is patched or registered at import."""
    code = """
import tests
import transformers
from transformers.models.internvl import modeling_internvl
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3_vl import modeling_qwen3_vl
from transformers import AttentionInterface, masking_utils, modeling_utils, cache_utils, generation
from transformers.generation import utils
watched = [modeling_internvl, modeling_qwen2, modeling_qwen3_vl, masking_utils, modeling_utils, cache_utils, utils]
def look():
    found = {}
    for module in watched:
        for name, value in vars(module).items():
            found[module.__name__, name] = id(value)
            if isinstance(value, type) and value.__module__.startswith("transformers"):
                for inner, member in vars(value).items():
                    if not inner.startswith("_abc"):
                        found[module.__name__, name, inner] = id(member)
    return found, sorted(AttentionInterface().valid_keys())
before = look()
import statekv
for name in statekv.__all__:
    getattr(statekv, name)
import statekv.models.families.internvl, statekv.models.families.qwen3_vl, statekv.models.loading
print(look() == before)
"""
    assert run(code) == "True"


def test_public_names() -> None:
    assert set(statekv.__all__) >= {"Config", "Frame", "Session", "StateKVError", "__version__", "generate", "load"}
    for name in statekv.__all__:
        assert getattr(statekv, name) is not None
    assert dir(statekv) == statekv.__all__ == sorted(statekv.__all__)


def test_a_library_is_silent_until_somebody_listens() -> None:
    """What is logged goes to the application's handlers; without any, nothing is written to stderr."""
    code = """
import logging, statekv, sys
sys.stderr = sys.stdout
logging.getLogger("statekv.engine").warning("unheard")
logging.basicConfig(stream=sys.stdout, format="%(name)s: %(message)s")
logging.getLogger("statekv.engine").warning("heard")
"""
    assert run(code) == "statekv.engine: heard"


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="'statekv' has no attribute 'lod'"):
        statekv.lod  # noqa: B018


def test_the_version_is_the_distributions() -> None:
    assert statekv.__version__ == version("statekv")


def test_the_package_runs_as_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "statekv", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    assert "statekv" in done.stdout


def test_what_is_pinned_twice_is_pinned_alike() -> None:
    """`make` installs both lists under the constraints of the first."""
    lists = [(ROOT / name).read_text().splitlines() for name in ("constraints.txt", "tests/lmms-eval.txt")]
    first, second = ({line.partition("==")[0].lower(): line for line in lines if "==" in line} for lines in lists)
    assert {name: second[name] for name in first.keys() & second.keys() if first[name] != second[name]} == {}
