"""The formula against torch's count, on tiny models fed with real frames, and by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from statekv.bench.floor import counting
from statekv.bench.models import SIZES
from statekv.cache.stream import StreamState
from statekv.models.adapter import Segment
from statekv.models.flops import Widths, matrix_weights, step_flops
from statekv.runner.runner import ModelRunner
from tests.talk import shared_engine, some_frames, stock_model
from tests.tiny import FAMILIES, TWO_FAMILIES


class Counting(ModelRunner):
    """A stepper that notes tokens and FLOPs of every segment."""

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__(runner.model)
        self.lengths: list[int] = []
        self.counted: list[int] = []

    def prefill(self, state: StreamState, segment: Segment, *args: Any, **kwargs: Any) -> torch.Tensor:
        with counting() as counter:
            found = super().prefill(state, segment, *args, **kwargs)
        self.lengths.append(segment.length)
        self.counted.append(counter.get_total_flops())
        return found


@pytest.mark.parametrize(
    ("family", "budget"),
    [
        *((family, 20) for family in FAMILIES),
        *((family, budget) for family in TWO_FAMILIES for budget in (None, 10_000)),
    ],
)
def test_torch_counts_the_same_in_every_step(family: str, budget: int | None) -> None:
    engine = shared_engine(family)
    settings = {"method": "full"} if budget is None else {"kernel": "naive", "budget": budget}
    with engine.open(**settings) as session:
        session.runner = runner = Counting(session.runner)
        session.push(some_frames(8))
    widths = Widths.of(stock_model(family).config.get_text_config())
    assert len(runner.lengths) > 4
    assert runner.counted == list(step_flops(widths, runner.lengths, budget, scored_products=2))


def test_by_hand() -> None:
    size = Widths(hidden=4, intermediate=8, layers=2, heads=2, kv_heads=1, head_dim=3)
    projections = 4 * 6 + 2 * 4 * 3 + 6 * 4 + 3 * 4 * 8
    assert matrix_weights(size) == 2 * projections
    pair = 2 * 2 * 2 * 3  # multiply and add, layers, heads, head_dim
    weights = 2 * 2 * projections
    assert list(step_flops(size, [5, 5, 5], budget=7)) == [
        5 * weights + 2 * pair * 5 * 5,
        5 * weights + 3 * pair * 5 * 10,
        5 * weights + 3 * pair * 5 * 12,
    ]
    assert list(step_flops(size, [5, 5])) == [5 * weights + 2 * pair * 5 * 5, 5 * weights + 2 * pair * 5 * 10]


def test_weights_of_products_are_nearly_all_weights() -> None:
    for size in SIZES.values():
        assert 0.999 * size.parameters < matrix_weights(size) < size.parameters
