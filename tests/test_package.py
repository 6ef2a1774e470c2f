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


def test_settings_and_errors_need_no_torch() -> None:
    code = "import sys, statekv; statekv.Config(budget=3); statekv.StateKVError; print('torch' in sys.modules)"
    assert run(code) == "False"


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
    assert set(statekv.__all__) <= set(dir(statekv))


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="'statekv' has no attribute 'lod'"):
        statekv.lod  # noqa: B018


def test_the_version_is_the_distributions() -> None:
    assert statekv.__version__ == version("statekv")


def test_the_package_runs_as_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "statekv", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    assert "statekv" in done.stdout
