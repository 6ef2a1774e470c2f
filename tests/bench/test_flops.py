"""The formula against torch's count: on tiny models fed with real frames, and on real sizes as shapes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from statekv.bench.flops import check, counting, matrix_weights, measure, panel, step_flops
from statekv.bench.sizes import SIZES, Size, size_of
from statekv.cache.stream import StreamState
from statekv.models.base import Segment
from statekv.stepper import Stepper
from tests.talk import shared_engine, some_frames, stock_model
from tests.tiny import FAMILIES


def size_of_config(config: Any) -> Size:
    """A tiny model's sizes; what the formula does not look at stays somebody else's."""
    text = config.get_text_config()
    return replace(
        SIZES["internvl3-1b"],
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
    )


class Counting(Stepper):
    """A stepper that notes tokens and FLOPs of every segment."""

    def __init__(self, stepper: Stepper) -> None:
        super().__init__(stepper.model)
        self.lengths: list[int] = []
        self.counted: list[int] = []

    def prefill(self, state: StreamState, segment: Segment, *args: Any, **kwargs: Any) -> torch.Tensor:
        with counting() as counter:
            found = super().prefill(state, segment, *args, **kwargs)
        self.lengths.append(segment.length)
        self.counted.append(counter.get_total_flops())
        return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [None, 20, 10_000])
def test_torch_counts_the_same_in_every_step(family: str, budget: int | None) -> None:
    engine = shared_engine(family)
    method = "full" if budget is None else "statekv"
    with engine.open(method=method, kernel="naive", budget=budget or 1) as session:
        session.stepper = stepper = Counting(session.stepper)
        session.push(some_frames(8))
    size = size_of_config(stock_model(family).config)
    assert len(stepper.lengths) > 4
    assert stepper.counted == list(step_flops(size, stepper.lengths, budget, scored_products=2))


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("budget", [None, 300])
def test_torch_counts_the_same_in_real_widths(name: str, budget: int | None) -> None:
    assert check(name, budget, [256, 256, 100]).distance == 1


def test_torch_counts_the_same_in_real_depth() -> None:
    row = check("internvl3-1b", 300, [256, 256], layers=None)
    assert row.distance == 1
    assert row.samples[0] > 0.3


def test_by_hand() -> None:
    size = replace(SIZES["internvl3-1b"], hidden=4, intermediate=8, layers=2, heads=2, kv_heads=1, head_dim=3)
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


def test_full_is_quadratic_and_statekv_is_linear() -> None:
    rows = measure("internvl3-1b", [256], [1000, 2000, 4000])
    full, statekv = ([row.samples[0] for row in rows if row.subject == name] for name in ("full", "statekv"))
    assert statekv[2] - statekv[1] == pytest.approx(2 * (statekv[1] - statekv[0]))
    assert full[2] - full[1] > 3 * (full[1] - full[0])
    assert all(row.floor is not None and row.samples[0] > row.floor for row in rows)


def test_families_differ_in_frames_per_step() -> None:
    (one,) = measure("internvl3-8b", [], [10])
    (two,) = measure("eagle2.5-8b", [], [10])
    assert one.samples == two.samples
    assert measure("qwen3-vl-2b", [], [9])[0].samples == measure("qwen3-vl-2b", [], [10])[0].samples


def test_the_picture_ends_where_the_table_does() -> None:
    found = panel("qwen3-vl-4b", [256], 37)
    assert set(found.lines) == {"full", "statekv, B = 256"}
    last = {row.subject: row.samples[0] for row in measure("qwen3-vl-4b", [256], [37])}
    assert found.lines["full"][-1] == pytest.approx((37, last["full"] / 1000))
    assert found.lines["statekv, B = 256"][-1] == pytest.approx((37, last["statekv"] / 1000))


def test_sizes_are_known_by_name() -> None:
    assert size_of("qwen3-vl-4b").layers == 36
