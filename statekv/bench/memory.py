"""Bytes of both caches against the formula, bytes copied while they grow, and the peak memory of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any
from weakref import finalize

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from statekv.bench.harness import Panel, Row, Setting
from statekv.bench.models import build, size_of
from statekv.cache.carried import CarriedCache
from statekv.cache.detailed import DetailedCache
from statekv.cache.spec import KVSpec
from statekv.cache.stream import StreamState
from statekv.config import Config
from statekv.models.size import Size
from statekv.runner.memory import check_fits
from statekv.runner.runner import ModelRunner

_MEBI = 2**20
_HOLDS, _COPIED, _CARRIES = "detailed holds", "detailed copied", "carried holds"
_VOCABULARY = 64  # tokens of the model whose step is looked at: a step reads no more than its own


def detailed_rows(name: str, dtype: torch.dtype, steps: Iterable[int]) -> list[Row]:
    """Fill a detailed cache of real size, shapes alone, and look at it after some numbers of steps.

    Returns:
        For each number of steps, in MiB: what the cache holds (the floor is the formula, tokens times bytes of one) and
        what was copied to fill it (the floor is each token once, the reference a concatenation at every step).
    """
    size, rows = size_of(name), []
    spec = _geometry(size, dtype)
    cache = DetailedCache(spec)
    own = torch.empty(1, size.kv_heads, size.tokens_per_step, size.head_dim, dtype=dtype, device="meta")
    copied, done = CopiedBytes(), 0
    for count in sorted(steps):
        with copied:
            for _ in range(count - done):
                for layer in range(size.layers):
                    cache.append(own, own, layer)
        done = count
        tokens = spec.bytes_per_token * cache.length / _MEBI
        setting = _setting(name, dtype) | {"steps": count}
        concatenated, grown = tokens * (count + 1) / 2, f"grown {cache.grown // size.layers} times"
        rows += [
            Row("memory", _HOLDS, setting, "MiB", (cache.nbytes / _MEBI,), tokens),
            Row("memory", _COPIED, setting, "MiB", (copied.total / _MEBI,), tokens, concatenated, grown),
        ]
    return rows


def carried_row(name: str, dtype: torch.dtype, budget: int) -> Row:
    """Fill a carried cache of real size, shapes alone, until it evicts: MiB that it holds, the record of births
    included; the floor is the formula without that.
    """
    size = size_of(name)
    spec = _geometry(size, dtype)
    state = _filled(spec, budget, size.tokens_per_step)
    floor = spec.bytes_per_token * (budget + size.tokens_per_step)
    setting = _setting(name, dtype) | {"budget": budget}
    return Row("memory", _CARRIES, setting, "MiB", (state.nbytes["carried"] / _MEBI,), floor / _MEBI)


def peak_rows(
    name: str, device: torch.device, dtype: torch.dtype, budgets: Iterable[int], layers: int = 2
) -> list[Row]:
    """Step the first layers of a model's real width with a full carried cache; behind the second, none adds to it.

    Returns:
        For each budget, the plain step's peak in MiB above weights and caches; the floor is what the MLP must hold at
        once: its two inner activations, its input and the residual.

    Raises:
        MemoryLimitError: weights or caches do not fit.
    """
    size, rows = replace(size_of(name, layers), vocab=_VOCABULARY), []
    floor = size.tokens_per_step * 2 * (size.intermediate + size.hidden) * dtype.itemsize
    remark = "" if device.type == "cuda" else "of tensors, not inside of kernels"
    for budget in budgets:
        needed = 4 * size.kv_bytes_per_token(dtype) * budget  # random keys and values, and both caches
        check_fits(f"a budget of {budget} tokens in {layers} layers", needed, device, "lower budgets")
    runner = ModelRunner(build(size, device, dtype))
    for budget in budgets:
        step = _step(runner, size, budget)
        step()  # whatever is made once is made here
        found, setting = peak_bytes(step, device), _setting(name, dtype) | {"budget": budget}
        rows.append(Row("memory", "a step's peak", setting, "MiB", (found / _MEBI,), floor / _MEBI, remark=remark))
    return rows


def _step(runner: ModelRunner, size: Size, budget: int) -> Callable[[], object]:
    """A step of a stream that carries `budget` random keys and has room for some steps more."""
    tokens, spec = size.tokens_per_step, runner.model.kv_spec()
    state = runner.open(Config(budget=budget, graph=False), horizon=2 * budget + 16 * tokens)
    state.detailed.reserve(budget + 4 * tokens)
    carried = state.carried
    assert isinstance(carried, CarriedCache)
    carried.open_slots(budget + tokens)
    shape = (2, 1, size.kv_heads, budget, size.head_dim)
    keys, values = torch.randn(shape, dtype=spec.dtype, device=spec.devices[0])
    for layer in range(size.layers):
        carried.update(keys, values, layer)
    state.position = budget
    return lambda: runner.enter(state, runner.model.text("step", [0] * tokens, state.position))


def panels(rows: Sequence[Row]) -> list[Panel]:
    """Bytes held and copied against steps, a panel per model."""
    return [
        Panel(str(model), "steps", "GiB", _lines([row for row in rows if row.setting["model"] == model]), True, True)
        for model in dict.fromkeys(row.setting["model"] for row in rows)
    ]


def _lines(rows: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    lines: dict[str, list[tuple[float, float]]] = {}
    steps = sorted({float(row.setting["steps"]) for row in rows if "steps" in row.setting})
    for row in rows:
        if row.subject in (_HOLDS, _COPIED):
            point = float(row.setting["steps"])
            lines.setdefault(row.subject, []).append((point, row.median / 1024))
            if row.reference is not None:
                lines.setdefault("torch.cat would copy", []).append((point, row.reference / 1024))
        elif row.subject == _CARRIES:
            full = float(row.setting["budget"]) / size_of(str(row.setting["model"])).tokens_per_step
            line = [(step, row.median / 1024) for step in steps if step >= full]
            lines[f"{_CARRIES}, B = {row.setting['budget']}"] = line
    return {name: line for name, line in lines.items() if line}


def _filled(spec: KVSpec, budget: int, tokens: int) -> StreamState:
    state = StreamState(spec, Config(budget=budget), horizon=2**31)
    carried = state.carried
    assert isinstance(carried, CarriedCache)
    own = torch.empty(1, spec.kv_heads, tokens, spec.head_dim, dtype=spec.dtype, device="meta")
    for _ in range(budget // tokens + 2):
        carried.open_slots(tokens)
        for layer in range(spec.layers):
            keys, _ = carried.update(own, own, layer)
            carried.evict(layer, keys[..., 0].float())
    return state


def _geometry(size: Size, dtype: torch.dtype) -> KVSpec:
    return KVSpec(size.kv_heads, size.head_dim, dtype, (torch.device("meta"),) * size.layers)


def _setting(name: str, dtype: torch.dtype) -> Setting:
    return {"model": name, "dtype": str(dtype).removeprefix("torch.")}


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Most bytes that work has allocated at once, above what was allocated before it.

    On CUDA that is the allocator's own record. A CPU has none: there it is what all tensors together take that exist
    at the same time; what a kernel allocates inside itself is missing.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before: int = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        most: int = torch.cuda.max_memory_allocated(device)
        return most - before
    held = HeldBytes()
    with held:
        work()
    return held.peak


class HeldBytes(TorchDispatchMode):
    """Bytes of the tensors that were made inside and still exist: `now`, and at most so far (`peak`)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        old = {_storage(tensor) for tensor in tree_leaves(args) if isinstance(tensor, torch.Tensor)}
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and _storage(tensor) not in old | self._known:
                self._take(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return found

    def _take(self, storage: torch.UntypedStorage) -> None:
        address, taken = storage._cdata, storage.nbytes()
        self._known.add(address)
        self.now += taken

        def give_back() -> None:
            self._known.discard(address)
            self.now -= taken

        finalize(storage, give_back)


class CopiedBytes(TorchDispatchMode):
    """Counts the bytes (`total`) that copies and concatenations write inside; shapes alone are enough for that."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.copy_, torch.ops.aten.cat):
            self.total += found.nbytes
        return found


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
