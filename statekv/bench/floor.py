"""The least that a step or an answer can cost: its products at the machine's measured rate, its bytes at memory's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from statekv.bench.harness import Panel, Row, Setting, alternate, matmul_rate
from statekv.bench.models import build, size_of
from statekv.config import Config
from statekv.models import adapter_of
from statekv.models.flops import matrix_weights, step_flops
from statekv.models.size import Size
from statekv.runner.runner import ModelRunner

_READ_BYTES = 1 << 29  # larger than any processor cache


@dataclass(frozen=True)
class Machine:
    """What was measured in the same run: FLOP/s in products with a large weight, bytes per second out of memory."""

    flops: float
    read: float

    @classmethod
    def measured(cls, device: torch.device, dtype: torch.dtype) -> Machine:
        """Rates of products in a dtype, and of memory."""
        return cls(matmul_rate(device, dtype), read_rate(device))

    def seconds(self, flops: float, read: float = 0) -> float:
        """Floor of some work, where products and memory run at the same time."""
        return max(flops / self.flops, read / self.read)


@torch.inference_mode()
def read_rate(device: torch.device, count: int = _READ_BYTES, runs: int = 10) -> float:
    """Bytes per second of a sum over `count` bytes of float32: the best of `runs`, for a floor is a floor."""
    data = torch.ones(count // 4, device=device)
    seconds = alternate({"read": lambda: data.sum()}, runs=runs, device=device)["read"]
    return data.nbytes / min(seconds)


def segment_flops(size: Size, tokens: int, past: int) -> int:
    """FLOPs of `tokens` tokens behind `past` visible ones: projections and attention; norms and softmax not counted."""
    pairs = tokens * past + tokens * (tokens + 1) // 2  # of a query and a key that it sees
    return 2 * size.parameters * tokens + 4 * size.layers * size.heads * size.head_dim * pairs


def head_flops(size: Size) -> int:
    """FLOPs of the logits of one token."""
    return 2 * size.vocab * size.hidden


def answer_bytes(size: Size, past: int, dtype: torch.dtype) -> int:
    """What must be read for one token of an answer behind `past` others: all weights, all keys and values."""
    weights = (size.parameters + size.vocab * size.hidden) * dtype.itemsize
    return weights + past * size.kv_bytes_per_token(dtype)


_TERA = 1e12
_POINTS = 24  # of a line in the picture


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Count the FLOPs of steps whose kernel is naive; stock attention is made of plain products meanwhile.

    A CPU's fused attention kernels are invisible to torch's counter.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        yield counter


def check(name: str, budget: int | None, steps: Sequence[int], layers: int | None = 2) -> Row:
    """Run the first steps, of so many tokens each, of a model in its real width, shapes alone, and hold torch's count
    against the formula as a row's floor: the distance must be 1. Without a budget that is `full`; layers None: all of
    them.
    """
    size = size_of(name, layers)
    runner = ModelRunner(build(size, torch.device("meta"), torch.bfloat16))
    method = "full" if budget is None else "statekv"
    settings = {} if budget is None else {"budget": budget, "kernel": "naive"}
    state = runner.open(Config.of(method, **settings))
    with counting() as counter:
        for tokens in steps:
            runner.enter(state, runner.model.text("step", [0] * tokens, state.position))
    formula = sum(step_flops(size, steps, budget, scored_products=2))
    setting = _setting(name, len(steps) * adapter_of(size.family).frames_per_step, budget)
    found, remark = counter.get_total_flops() / _TERA, f"torch's count of {size.layers} layers; floor: formula"
    return Row("flops", f"check of {method}", setting, "TFLOP", (found,), formula / _TERA, remark=remark)


def measure(name: str, budgets: Iterable[int], frames: Iterable[int]) -> list[Row]:
    """TFLOP of `full` and of `statekv` at some budgets, after some numbers of frames; the floor is a model without
    attention, the reference `full`.
    """
    size, rows = size_of(name), []
    for count in frames:
        steps = _steps(size, count)
        floor = 2 * matrix_weights(size) * sum(steps) / _TERA
        full = sum(step_flops(size, steps)) / _TERA
        rows.append(Row("flops", "full", _setting(name, count, None), "TFLOP", (full,), floor, full))
        for budget in budgets:
            found = sum(step_flops(size, steps, budget)) / _TERA
            rows.append(Row("flops", "statekv", _setting(name, count, budget), "TFLOP", (found,), floor, full))
    return rows


def panel(name: str, budgets: Iterable[int], frames: int) -> Panel:
    """Cost up to so many frames, a line per method and budget."""
    size = size_of(name)
    counts = sorted({max(1, round(frames * point / _POINTS)) for point in range(1, _POINTS + 1)})
    chosen: dict[str, int | None] = {"full": None} | {f"statekv, B = {budget}": budget for budget in budgets}
    lines = {}
    for label, budget in chosen.items():
        total, sums = 0, [0]
        for flops in step_flops(size, _steps(size, frames), budget):
            total += flops
            sums.append(total)
        lines[label] = [(float(count), sums[len(_steps(size, count))] / 1e15) for count in counts]
    return Panel(name, "frames", "PFLOP of prefill", lines)


def _steps(size: Size, frames: int) -> list[int]:
    """Vision tokens of each step; the few words around a frame are left out."""
    return [size.tokens_per_step] * -(-frames // adapter_of(size.family).frames_per_step)


def _setting(name: str, frames: int, budget: int | None) -> Setting:
    return {"model": name, "frames": frames, "budget": "" if budget is None else budget}
