"""Steps of several sessions as one batch, against the same steps in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from statekv.bench.floor import segment_flops
from statekv.bench.harness import Panel, Row, alternate_within, best_rate, large_product, milliseconds
from statekv.bench.models import build, fill, random_step, setting_of, size_of, stand
from statekv.cache.stream import StreamState, room_for_answers
from statekv.config import Config
from statekv.models.adapter import Segment, VideoModel
from statekv.models.loading import load_model
from statekv.models.size import Size
from statekv.runner.memory import check_fits
from statekv.runner.runner import ModelRunner

DEMO = "demo"
TOGETHER, ANEW, IN_TURN, LARGE = "together", "together anew", "in turn", "large product"
_DEMO_TOKENS = 9  # of a step: four of the picture, the rest is its label


@dataclass(frozen=True)
class Plan:
    """What to measure on one model.

    Attributes:
        name: of a size, whose weights are random; or demo, with its own.
        budget: carried tokens; every session has reached it.
        tokens: of a step; None: the model's own.
        seconds: what one way may take in all; slower ones get fewer runs.
    """

    name: str
    sessions: tuple[int, ...]
    budget: int
    tokens: int | None
    layers: int | None
    runs: int
    seconds: float

    def opened(self, device: torch.device, dtype: torch.dtype) -> tuple[VideoModel, Size]:
        """The model, and the sizes that its floor is made of."""
        if self.name != DEMO:
            size = size_of(self.name, self.layers)
            return build(size, device, dtype), size
        model = load_model(DEMO, dtype=dtype, device=device)
        return model, _size(model)


def measure(plan: Plan, *, device: torch.device, dtype: torch.dtype) -> list[Row]:
    """Step every number of sessions in both ways, all in turns.

    Returns:
        A row of the large product whose best rate the floors are made of, then one per number and way, in ms per step
        of one session. Those stepped together are held against those in turn; anew means that their carried caches
        are copied into a new block each time, as if other sessions met at every step.

    Raises:
        MemoryLimitError: weights or caches do not fit.
    """
    model, size = plan.opened(device, dtype)
    runner, tokens = ModelRunner(model), plan.tokens or size.tokens_per_step
    past = (plan.budget // tokens + 2) * tokens
    sessions = 2 * sum(plan.sessions) + max(plan.sessions)
    needed = sessions * (past + plan.budget + 2 * tokens) * size.kv_bytes_per_token(dtype)
    check_fits(
        f"{sessions} sessions of {plan.name}", needed, device, "try fewer sessions, a lower budget or fewer layers"
    )
    streams = [_Stream(runner, plan.budget, past, tokens) for _ in range(max(plan.sessions))]
    calls: dict[str, Callable[[], object]] = {LARGE: large_product(device, dtype)}
    for count in plan.sessions:
        calls[f"{IN_TURN} {count}"] = _in_turn(streams[:count])
        for way, anew in ((TOGETHER, False), (ANEW, True)) if count > 1 else ():
            own = [_Stream(runner, plan.budget, past, tokens) for _ in range(count)]  # they stay in their block
            calls[f"{way} {count}"] = _together(own, anew)
    seconds = alternate_within(calls, runs=plan.runs, seconds=plan.seconds, device=device)
    floor = 1000 * segment_flops(size, tokens, plan.budget) / best_rate(seconds[LARGE])
    setting, large = setting_of(size, dtype, tokens), milliseconds(seconds[LARGE])
    rows = [Row("sessions", LARGE, setting, "ms", large, min(large))]
    for count in plan.sessions:
        reference = None
        for way in (IN_TURN, TOGETHER, ANEW):
            samples = milliseconds(second / count for second in seconds.get(f"{way} {count}", []))
            if samples:
                here = {**setting, "budget": plan.budget, "sessions": count}
                row = Row("sessions", way, here, "ms", samples, floor, reference)
                rows.append(Row("sessions", way, here, "ms", samples, floor, reference, f"{_rate(row):.3g} steps/s"))
                reference = reference or row.median
    return rows


def panels(rows: Iterable[Row]) -> list[Panel]:
    """Steps per second against the number of sessions: a panel per model, a line per way."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        if row.subject != LARGE:
            title = f"{row.setting['model']}, B = {row.setting['budget']}, {row.setting['tokens']} tokens a step"
            point = (float(row.setting["sessions"]), _rate(row))
            found.setdefault(title, {}).setdefault(row.subject, []).append(point)
    return [Panel(title, "sessions", "steps per second, all sessions", lines) for title, lines in found.items()]


class _Stream:
    """A session's stream with a full carried cache, and the step that it takes again and again."""

    def __init__(self, runner: ModelRunner, budget: int, past: int, tokens: int) -> None:
        self.runner, self.past, self.tokens = runner, past, tokens
        self.position = past // tokens * runner.model.stride(tokens)
        config = Config.of("statekv", budget=budget)
        horizon = self.position + runner.model.stride(tokens) + room_for_answers(config)
        self.state = runner.open(config, max(horizon, runner.model.trained_length))
        fill(self.state, past, tokens)
        self.segment = random_step(runner.model, tokens, past // tokens + 1)

    def stand(self) -> tuple[StreamState, Segment]:
        """Before the step, a matter of microseconds."""
        stand(self.state, self.past, self.position, self.tokens)
        return self.state, self.segment


def _in_turn(streams: Sequence[_Stream]) -> Callable[[], object]:
    def call() -> None:
        for stream in streams:
            stream.runner.enter(*stream.stand())

    return call


def _together(streams: Sequence[_Stream], anew: bool) -> Callable[[], object]:
    streams = list(streams)

    def call() -> object:
        if anew:
            streams.reverse()
        states, segments = zip(*(stream.stand() for stream in streams), strict=True)
        return streams[0].runner.prefill_batch(states, segments)

    return call


def _rate(row: Row) -> float:
    """Steps per second of all sessions."""
    return 1000 / row.median


def _size(model: VideoModel) -> Size:
    """Sizes of a model's language model, as far as its floor depends on them."""
    c, spec = model.text_config, model.kv_spec()
    return Size(
        *(DEMO, str(model.model.config.model_type), c.hidden_size, c.intermediate_size, spec.layers),
        *(c.num_attention_heads, spec.kv_heads, spec.head_dim, c.vocab_size),
        rope_theta=0.0,  # no part of the floor
        rope_factor=None,
        trained_length=model.trained_length,
        qkv_bias=True,
        tied=False,
        tokens_per_step=_DEMO_TOKENS,
    )
