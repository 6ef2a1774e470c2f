"""A stranger's file: called as the public release defines its function, and refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from statekv.bench.peer import load_peer
from statekv.errors import ConfigError

ECHO = """
def flash_attn_with_key_scores(q, k, v, sm_scale=None, causal=True, cache_len=0):
    return q * sm_scale, (k.shape[2], v.shape[2], causal, cache_len)
"""


def test_the_function_is_called_as_the_release_defines_it(tmp_path: Path) -> None:
    (tmp_path / "peer.py").write_text(ECHO)
    query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 10, 8)
    mixed, told = load_peer(tmp_path / "peer.py")(query, key, key, 0.5)
    assert torch.equal(mixed, query * 0.5)
    assert told == (10, 10, True, 7)


@pytest.mark.parametrize(
    ("name", "text", "rule"),
    [
        ("missing.py", None, "is not a file"),
        ("peer.txt", ECHO, "is not Python"),
        ("empty.py", "", "has no function flash_attn_with_key_scores"),
        ("number.py", "flash_attn_with_key_scores = 3", "has no function"),
        ("syntax.py", "def flash_attn_with_key_scores(:", "does not run: SyntaxError"),
        ("import.py", "import a_module_that_nobody_has", "does not run: ModuleNotFoundError"),
        ("exit.py", "raise RuntimeError('first\\nsecond')", "does not run: RuntimeError: first"),
        ("bytes.py", b"\xff\xfe\x00", "does not run"),
    ],
)
def test_a_file_that_is_no_peer(tmp_path: Path, name: str, text: str | bytes | None, rule: str) -> None:
    if text is not None:
        (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError) as caught:
        load_peer(tmp_path / name)
    assert name in str(caught.value)
    assert rule in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_peer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a file"):
        load_peer(tmp_path)
