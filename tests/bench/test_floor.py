"""Floors by hand."""

from __future__ import annotations

import pytest
import torch

from statekv.bench.floor import Machine, answer_bytes, check, head_flops, measure, panel, read_rate, segment_flops
from statekv.bench.models import SIZES, size_of
from tests.bench.small import CPU, INTERNVL


def test_flops_are_weights_and_visible_pairs() -> None:
    size = INTERNVL
    pairs = 5 + 6 + 7  # three queries behind four keys, each with the own ones up to itself
    attention = size.layers * size.heads * pairs * 2 * (2 * size.head_dim)  # <q, k>, and the mixture of values
    assert segment_flops(size, 3, 4) == 2 * size.parameters * 3 + attention


def test_head_and_bytes_of_an_answers_token() -> None:
    size = INTERNVL
    assert head_flops(size) == 2 * 64 * 128
    weights = size.parameters + 64 * 128
    assert answer_bytes(size, 100, torch.bfloat16) == 2 * weights + 100 * size.kv_bytes_per_token(torch.bfloat16)


def test_products_and_memory_run_at_the_same_time() -> None:
    machine = Machine(flops=100, read=10)
    assert machine.seconds(500) == 5
    assert machine.seconds(500, read=20) == 5
    assert machine.seconds(500, read=80) == 8


def test_memory_is_read_at_some_rate() -> None:
    assert read_rate(CPU, count=1 << 16, runs=2) > 0


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("budget", [None, 300])
def test_torch_counts_the_same_in_real_widths(name: str, budget: int | None) -> None:
    assert check(name, budget, [256, 256, 100]).distance == 1


def test_torch_counts_the_same_in_real_depth() -> None:
    row = check("internvl3-1b", 300, [256, 256], layers=None)
    assert row.distance == 1
    assert row.samples[0] > 0.3


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
