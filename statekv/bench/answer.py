"""Time to the first token of an answer and to each further one, against the length of the stream."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from statekv.bench.floor import Machine, answer_bytes, head_flops, segment_flops
from statekv.bench.harness import Panel, Row, Setting, milliseconds, wait
from statekv.bench.models import build, fill, setting_of, stand
from statekv.cache.stream import StreamState, room_for_answers
from statekv.config import Config
from statekv.models.adapter import Segment
from statekv.models.size import Size
from statekv.runner.decoding import SamplingParams
from statekv.runner.memory import check_fits, refusal
from statekv.runner.runner import ModelRunner

FIRST, EACH = "first token", "each further token"


@dataclass(frozen=True)
class Plan:
    """What to measure on one model: greedy answers of 2 tokens or more, `runs` at each length of the stream in `steps`
    of so many tokens.
    """

    size: Size
    steps: tuple[int, ...]
    tokens: int
    question: int
    answer: int
    runs: int

    def cache_bytes(self, steps: int, dtype: torch.dtype) -> int:
        """The detailed cache, question and answer included."""
        return (steps * self.tokens + self.question + self.answer) * self.size.kv_bytes_per_token(dtype)


def measure(plan: Plan, *, device: torch.device, dtype: torch.dtype, machine: Machine) -> list[Row]:
    """Ask at every length of the stream, in turns; the machine's rates make the floors.

    Returns:
        Two rows per length, in ms, one sample per answer; where the cache does not fit in memory they have none and a
        remark.

    Raises:
        MemoryLimitError: the weights or the shortest stream do not fit.
    """
    runner = ModelRunner(build(plan.size, device, dtype))
    short = min(plan.steps)
    hint = "try fewer layers or a half dtype"
    check_fits(f"{plan.size.name} after {short} steps", plan.cache_bytes(short, dtype), device, hint)
    remarks = {steps: refusal("its cache", plan.cache_bytes(steps, dtype), device) for steps in plan.steps}
    seconds = _time(runner, plan, [steps for steps in plan.steps if not remarks[steps]], device)
    rows = []
    for kind in (FIRST, EACH):
        for steps in plan.steps:
            samples = milliseconds(seconds.get((kind, steps), []))
            floor = 1000 * _floor(plan, kind, steps, dtype, machine)
            asked: Setting = {"question": plan.question, "answer": plan.answer, "steps": steps}
            setting = setting_of(plan.size, dtype, plan.tokens) | asked
            rows.append(Row("answer", kind, setting, "ms", samples, floor, remark=remarks[steps]))
    return rows


def panels(rows: Iterable[Row]) -> list[Panel]:
    """Both times against the length of the stream: a panel per model, with the floors."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        lines = found.setdefault(f"{row.setting['model']}, {row.setting['layers']} layers", {})
        steps = float(row.setting["steps"])
        if row.samples and row.floor is not None:
            lines.setdefault(row.subject, []).append((steps, row.median))
            lines.setdefault(f"{row.subject}, floor", []).append((steps, row.floor))
    return [Panel(title, "steps seen", "ms", lines, log_x=True, log_y=True) for title, lines in found.items()]


def _time(
    runner: ModelRunner, plan: Plan, lengths: Sequence[int], device: torch.device
) -> dict[tuple[str, int], list[float]]:
    """Seconds by what was waited for and the length of the stream; one answer at each length goes first, untimed."""
    config = Config.of("full", max_new_tokens=plan.answer)
    positions = max(lengths) * runner.model.stride(plan.tokens)
    state = runner.open(config, positions + plan.question + room_for_answers(config))
    fill(state, max(lengths) * plan.tokens, plan.question + plan.answer)
    found: dict[tuple[str, int], list[float]] = {(kind, steps): [] for kind in (FIRST, EACH) for steps in lengths}
    for run in range(1 + plan.runs):
        for steps in lengths:
            position = steps * runner.model.stride(plan.tokens)
            stand(state, steps * plan.tokens, position, plan.tokens)
            question = runner.model.text("question", torch.arange(plan.question), position)
            for kind, took in zip((FIRST, EACH), _answer(runner, state, question, plan.answer, device), strict=True):
                if run:
                    found[kind, steps].append(took)
    return found


def _answer(
    runner: ModelRunner, state: StreamState, question: Segment, tokens: int, device: torch.device
) -> tuple[float, float]:
    """Seconds to the first token, and on average to each one behind it."""
    ends: list[float] = []
    wait(device)
    began = time.perf_counter()
    logits = runner.ask(state, question, tokens)
    for _ in runner.decode(state, logits, SamplingParams(tokens), question.ids):
        wait(device)
        ends.append(time.perf_counter())
    return ends[0] - began, (ends[-1] - ends[0]) / (len(ends) - 1)


def _floor(plan: Plan, kind: str, steps: int, dtype: torch.dtype, machine: Machine) -> float:
    """Seconds: the question's products, or the bytes of weights and cache, whichever takes longer."""
    past = steps * plan.tokens
    tokens = plan.question if kind == FIRST else 1
    if kind == EACH:
        past += plan.question + plan.answer // 2
    flops = segment_flops(plan.size, tokens, past) + head_flops(plan.size)
    return machine.seconds(flops, answer_bytes(plan.size, past, dtype))
