"""Somebody else's attention with key scores, from a file that the user names."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch

from statekv.errors import ConfigError

FUNCTION = "flash_attn_with_key_scores"
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]


def load_peer(path: Path) -> Attention:
    """Run a Python file and take its `flash_attn_with_key_scores`.

    The function is called as the public release of StateKV defines it: `(q, k, v, sm_scale=, causal=, cache_len=)` with
    q [B, heads, Q, D], k and v [B, kv_heads, cache_len + Q, D]; it returns [B, heads, Q, D] and key scores
    [B, heads, K], a row for each query head.

    Returns:
        A function of query, key, value and scale.

    Raises:
        ConfigError: no such file, a file that does not run, or one without the function.
    """
    if not path.is_file():
        raise ConfigError(f"--peer {path} is not a file", f"give a Python file that defines {FUNCTION}")
    spec = importlib.util.spec_from_file_location("statekv_peer", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--peer {path} is not Python", f"give a .py file that defines {FUNCTION}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a stranger's file may fail in any way
        raise ConfigError(f"--peer {path} does not run: {told(error)}", "it must import without errors") from None
    function = getattr(module, FUNCTION, None)
    if not callable(function):
        raise ConfigError(f"--peer {path} has no function {FUNCTION}", "define it there, or give another file")

    def attention(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cached = key.shape[2] - query.shape[2]
        found: tuple[torch.Tensor, torch.Tensor] = function(
            query, key, value, sm_scale=scale, causal=True, cache_len=cached
        )
        return found

    return attention


def told(error: BaseException) -> str:
    """An exception's kind and first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
