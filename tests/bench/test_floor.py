"""Floors by hand."""

from __future__ import annotations

import torch

from statekv.bench.floor import Machine, answer_bytes, head_flops, read_rate, segment_flops
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
