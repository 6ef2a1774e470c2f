"""Attention with key scores, every way of making it, beside stock attention that makes none."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch

from statekv.bench.harness import Panel, Row, Setting, alternate, milliseconds
from statekv.bench.models import size_of
from statekv.errors import ConfigError, StateKVError
from statekv.ops import IMPLEMENTATIONS, attention_with_key_scores
from statekv.ops.attention import flash_attention, with_flash_attention, with_torch
from statekv.runner.memory import check_fits

STOCK, _FLASH = "sdpa", "flash-attn"
_NAIVE_BYTES = 256 << 20  # of one matrix of all heads, of which the definition holds several

Call = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """One step's attention in one layer: `queries` own tokens behind `budget` carried ones."""

    models: str
    heads: int
    kv_heads: int
    head_dim: int
    budget: int
    queries: int = 256

    @property
    def keys(self) -> int:
        return self.budget + self.queries

    @property
    def pairs(self) -> int:
        """Query and key positions that see each other."""
        return self.queries * self.budget + self.queries * (self.queries + 1) // 2

    @property
    def flops(self) -> int:
        """Of the two products, <q, k> and the mixture of values; masked pairs are not counted."""
        return 2 * 2 * self.heads * self.head_dim * self.pairs

    @property
    def setting(self) -> Setting:
        heads = f"{self.heads}/{self.kv_heads} x {self.head_dim}"
        return {"models": self.models, "heads": heads, "budget": self.budget, "queries": self.queries}


def shapes(models: Iterable[str], budgets: Iterable[int], queries: int) -> list[Shape]:
    """What to measure; models whose layers look alike share a shape."""
    alike: dict[tuple[int, int, int], list[str]] = {}
    for name in models:
        size = size_of(name)
        alike.setdefault((size.heads, size.kv_heads, size.head_dim), []).append(name)
    return [Shape(" ".join(names), *heads, budget, queries) for heads, names in alike.items() for budget in budgets]


@torch.inference_mode()
def measure(
    shape: Shape, *, device: torch.device, dtype: torch.dtype, runs: int, rate: float, peer: Attention | None = None
) -> list[Row]:
    """Time all candidates at one shape, in turns, on random queries, keys and values.

    Args:
        rate: FLOP/s of the machine in this dtype.
        peer: see `load_peer`; it is timed as it is, without the sum over a group's heads that the others make.

    Returns:
        A row per candidate, in ms; the reference is the faster one without scores. A candidate that cannot run has no
        samples and a remark.

    Raises:
        MemoryLimitError: not even keys and values fit.
    """
    needed = 2 * shape.kv_heads * shape.keys * shape.head_dim * dtype.itemsize
    check_fits(f"keys and values of {shape.keys} tokens", needed, device, "lower budgets")
    calls: dict[str, Call] = {}
    remarks: dict[str, str] = {}
    query, key, value = _inputs(shape, device, dtype)
    expected = with_torch(query, key, value, scale=shape.head_dim**-0.5)
    for name, call in _candidates(shape, query, key, value, peer):
        remarks[name] = _refusal(name, shape, device) or _first_call(call, expected)
        if not remarks[name]:
            calls[name] = call
    seconds = alternate(calls, runs=runs, device=device)
    stock = min(median(milliseconds(seconds[name])) for name in (STOCK, _FLASH) if name in seconds)
    setting = shape.setting | {"dtype": str(dtype).removeprefix("torch.")}
    floor = 1000 * shape.flops / rate
    return [
        Row("attention", name, setting, "ms", milliseconds(seconds.get(name, [])), floor, stock, remark)
        for name, remark in remarks.items()
    ]


def panels(rows: Iterable[Row]) -> list[Panel]:
    """Time against budget: a panel per shape of heads, a line per candidate, and the floor."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        lines = found.setdefault(f"{row.setting['heads']}\n{row.setting['models']}", {})
        budget = float(row.setting["budget"])
        if row.subject == STOCK and row.floor is not None:
            lines.setdefault("floor", []).append((budget, row.floor))
        if row.samples:
            lines.setdefault(row.subject, []).append((budget, row.median))
    return [Panel(title, "carried keys", "ms", lines, log_x=True, log_y=True) for title, lines in found.items()]


def _inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator(device).manual_seed(0)
    sizes = ((shape.heads, shape.queries), (shape.kv_heads, shape.keys), (shape.kv_heads, shape.keys))
    return tuple(
        torch.randn(1, *size, shape.head_dim, generator=generator, device=device, dtype=dtype) for size in sizes
    )


def _candidates(
    shape: Shape, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, peer: Attention | None
) -> Iterator[tuple[str, Call]]:
    scale = shape.head_dim**-0.5
    yield STOCK, partial(with_torch, query, key, value, scale=scale)
    flash = flash_attention() if query.is_cuda else None
    if flash is not None:
        yield _FLASH, partial(with_flash_attention, flash, query, key, value, scale=scale)
    for name in IMPLEMENTATIONS:
        yield name, partial(attention_with_key_scores, query, key, value, scale=scale, impl=name)
    if peer is not None:
        yield "peer", partial(peer, query, key, value, scale)


def _refusal(name: str, shape: Shape, device: torch.device) -> str:
    """Why a candidate is not even tried; empty where it is."""
    matrix = 4 * shape.heads * shape.queries * shape.keys  # float32
    if name == "naive" and matrix > _NAIVE_BYTES:
        return f"left out: a matrix of all heads takes {matrix >> 20} MiB, more than {_NAIVE_BYTES >> 20}"
    if name == "triton" and device.type != "cuda":
        return "left out: needs CUDA"
    return ""


def _first_call(call: Call, expected: torch.Tensor) -> str:
    """Why a candidate is not worth its time: it fails, or mixes something else; empty where all is well."""
    try:
        found = call()
    except StateKVError as error:
        return f"left out: {error.message}"
    except Exception as error:  # a peer may fail in any way, and the others are still worth their time
        return f"left out: {told(error)}"
    mixed = found[0] if isinstance(found, tuple) else found
    if not isinstance(mixed, torch.Tensor) or mixed.shape != expected.shape:
        return f"left out: does not return values {list(expected.shape)}"
    away = float((mixed.float() - expected.float()).abs().max() / expected.float().abs().max())
    allowed = 1e-3 if expected.dtype == torch.float32 else 5e-2
    return f"left out: its values are {away:.2g} of the largest away from {STOCK}'s" if not away <= allowed else ""


FUNCTION = "flash_attn_with_key_scores"
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]


def load_peer(path: Path) -> Attention:
    """Run a Python file and take its `flash_attn_with_key_scores`.

    The function is called as the public release of StateKV defines it: `(q, k, v, sm_scale=, causal=, cache_len=)` with
    q [B, heads, Q, D], k and v [B, kv_heads, cache_len + Q, D]; it returns [B, heads, Q, D] and key scores
    [B, heads, K], a row for each query head.

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
    return lambda query, key, value, scale: function(
        query, key, value, sm_scale=scale, causal=True, cache_len=key.shape[2] - query.shape[2]
    )


def told(error: BaseException) -> str:
    """An exception's kind and first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
