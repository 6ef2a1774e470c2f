"""Time per step against step number: rising for `full`, flat for `statekv`, one line per method and budget."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch

from statekv.bench.floor import segment_flops
from statekv.bench.harness import FULL, Panel, Row, alternate_within, best_rate, large_product, milliseconds
from statekv.bench.models import build, fill_carried, fill_detailed, products_alone, random_step, setting_of, stand
from statekv.cache.carried import CarriedCache
from statekv.cache.stream import StreamState, room_for_answers
from statekv.config import Config
from statekv.models.size import Size
from statekv.runner.memory import check_fits, refusal
from statekv.runner.runner import ModelRunner

PRODUCTS, LARGE = "products alone", "large product"
_VOCABULARY = 64


@dataclass(frozen=True)
class Plan:
    """What to measure on one model: steps by their numbers, from 1, for `full` and for others at each budget.

    Attributes:
        seconds: what one method may take at one number in all; slower ones get fewer runs.
        plain: also step the others without CUDA graphs.
        others: by their spelling, with a budget each.
    """

    size: Size
    steps: tuple[int, ...]
    budgets: tuple[int, ...]
    tokens: int
    runs: int
    seconds: float
    plain: bool = False
    others: Mapping[str, Config] = field(default_factory=lambda: {"statekv": Config()})

    @property
    def methods(self) -> list[tuple[str, Config]]:
        """`full`, and the others at each budget."""
        ways = (True, False) if self.plain else (True,)
        bounded = [
            (spelling, config.with_(budget=budget, graph=way))
            for spelling, config in self.others.items()
            for budget in self.budgets
            for way in ways
        ]
        return [(FULL, Config.of(FULL)), *bounded]

    def cache_bytes(self, step: int, dtype: torch.dtype) -> int:
        """What the detailed cache, shared by all methods, and the carried ones hold after a step."""
        carried = sum(method.budget + self.tokens for _, method in self.methods[1:])
        return (step * self.tokens + carried) * self.size.kv_bytes_per_token(dtype)

    def seen(self, method: Config, step: int) -> int:
        """Keys before a step's own that it attends to."""
        past = (step - 1) * self.tokens
        return past if method.carry == "all" else min(past, method.budget)


def measure(plan: Plan, *, device: torch.device, dtype: torch.dtype) -> list[Row]:
    """Time every method at every step number, all in turns.

    Returns:
        A row of the large product whose best rate all floors are made of; a row of a step's products with weights
        alone, for comparison; then a row per step number and method, in ms. Remarks hold medians against the product's
        median rate too, for noise falls on steps and products alike. Where the caches do not fit in memory a row has no
        samples and says so.

    Raises:
        MemoryLimitError: the weights or the nearest step's caches do not fit.
    """
    # A step starts from embeddings: the vocabulary takes no part in it, and its memory is better spent on keys.
    runner = ModelRunner(build(replace(plan.size, vocab=_VOCABULARY), device, dtype))
    near = min(plan.steps)
    hint = "try lower budgets, fewer layers or a half dtype"
    check_fits(f"{plan.size.name} at step {near}", plan.cache_bytes(near, dtype), device, hint)
    remarks = {step: refusal("its caches", plan.cache_bytes(step, dtype), device) for step in plan.steps}
    reached = [step for step, remark in remarks.items() if not remark]
    states = _fill(runner, plan, max(reached))
    calls = {
        _name(method, step): _call(runner, state, plan.tokens, step)
        for step in reached
        for method, state in zip(plan.methods, states, strict=True)
    }
    calls[PRODUCTS] = products_alone(runner.model, plan.tokens)
    calls[LARGE] = large_product(device, dtype, plan.tokens)  # in turns too, so that it meets the same machine
    seconds = alternate_within(calls, runs=plan.runs, seconds=plan.seconds, device=device)
    rate = best_rate(seconds[LARGE], plan.tokens)
    usual = min(seconds[LARGE]) / statistics.median(seconds[LARGE])
    floors = {LARGE: min(seconds[LARGE]), PRODUCTS: 2 * plan.size.parameters * plan.tokens / rate}
    alike = setting_of(plan.size, dtype, plan.tokens)
    rows = [
        Row("prefill", name, alike, "ms", milliseconds(seconds[name]), 1000 * floor) for name, floor in floors.items()
    ]
    for step in plan.steps:
        reference = None
        for spelling, method in plan.methods:
            samples = milliseconds(seconds.get(_name((spelling, method), step), []))
            setting = alike | {"step": step} | ({} if method.carry == "all" else {"budget": method.budget})
            setting |= {} if method.graph else {"plain": "yes"}
            floor = 1000 * segment_flops(plan.size, plan.tokens, plan.seen(method, step)) / rate
            row = Row("prefill", spelling, setting, "ms", samples, floor, reference, remarks[step])
            if row.distance is not None:
                row = replace(row, remark=f"{row.distance * usual:.3g} × the floor by medians")
            rows.append(row)
            if samples and spelling == FULL:
                reference = rows[-1].median
    return rows


def panels(rows: Iterable[Row]) -> list[Panel]:
    """Time per step against step number: a panel per model, a line per method and budget."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        if row.samples and row.subject not in (PRODUCTS, LARGE):
            budget = row.setting.get("budget")
            line = row.subject if budget is None else f"{row.subject}, B = {budget}"
            line += ", plain" if "plain" in row.setting else ""
            lines = found.setdefault(f"{row.setting['model']}, {row.setting['layers']} layers", {})
            lines.setdefault(line, []).append((float(row.setting["step"]), row.median))
    return [Panel(title, "step", "ms per step", lines, log_x=True, log_y=True) for title, lines in found.items()]


def _fill(runner: ModelRunner, plan: Plan, farthest: int) -> list[StreamState]:
    """A stream per method, filled as far as the farthest step's beginning; all share one detailed cache."""
    positions = farthest * runner.model.stride(plan.tokens)
    states = [runner.open(method, positions + room_for_answers(method)) for _, method in plan.methods]
    shared = states[0].detailed
    fill_detailed(shared, (farthest - 1) * plan.tokens, plan.tokens)
    for state in states[1:]:
        state.detailed = shared
        assert isinstance(state.carried, CarriedCache)
        fill_carried(state.carried, plan.tokens)
    return states


def _call(runner: ModelRunner, state: StreamState, tokens: int, step: int) -> Callable[[], object]:
    """Stand before a step and take it; standing there is a matter of microseconds."""
    segment = random_step(runner.model, tokens, step)
    past, position = (step - 1) * tokens, (step - 1) * runner.model.stride(tokens)

    def call() -> object:
        stand(state, past, position, tokens)
        return runner.enter(state, segment)

    return call


def _name(method: tuple[str, Config], step: int) -> str:
    spelling, config = method
    return f"{spelling} {config.budget} {config.graph} {step}"
