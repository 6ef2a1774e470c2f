"""Rows of `bench sessions`: both ways, the same steps, held against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from statekv.bench.floor import segment_flops
from statekv.bench.harness import Row, best_rate
from statekv.bench.models import SIZES
from statekv.bench.sessions import DEMO, Plan, _Stream, _together, measure, panels
from statekv.cache.batched import BatchedCarriedCache
from statekv.cache.carried import CarriedCache
from statekv.errors import ConfigError, MemoryLimitError
from statekv.models.size import Size
from statekv.runner import memory
from statekv.runner.runner import ModelRunner
from tests.bench.small import CPU, FAMILIES, INTERNVL, small
from tests.runner.test_runner import ATOL, RTOL

PLAN = Plan(INTERNVL.name, sessions=(1, 2, 3), budget=20, tokens=6, layers=None, runs=2, seconds=60)


@pytest.fixture(autouse=True)
def _small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in FAMILIES:
        monkeypatch.setitem(SIZES, size.name, size)  # type: ignore[arg-type]
    monkeypatch.setattr("statekv.bench.harness._WIDTH", 64)  # of the large product, which is timed beside them


def measured(plan: Plan = PLAN) -> list[Row]:
    return measure(plan, device=CPU, dtype=torch.float32)


@pytest.mark.parametrize("size", FAMILIES, ids=lambda size: size.family)
def test_a_row_per_number_and_way(size: Size) -> None:
    large, *rows = measured(replace(PLAN, name=size.name))
    assert large.subject == "large product"
    ways = [(1, "in turn"), *((count, way) for count in (2, 3) for way in ("in turn", "together", "together anew"))]
    assert [(row.setting["sessions"], row.subject) for row in rows] == ways
    assert all(len(row.samples) == 2 and row.unit == "ms" and row.remark.endswith("steps/s") for row in rows)
    floor = 1000 * segment_flops(size, 6, 20) / (1000 * best_rate(large.samples))
    assert all(row.floor == pytest.approx(floor) for row in rows)


def test_together_is_held_against_in_turn() -> None:
    _, _, *rows = measured()
    for in_turn, *together in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert in_turn.reference is None
        assert [row.reference for row in together] == [in_turn.median] * 2
        assert float(in_turn.remark.split()[0]) == pytest.approx(1000 / in_turn.median, rel=0.01)


@pytest.mark.parametrize("anew", [False, True])
def test_only_anew_makes_a_block_at_every_step(anew: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def block(members: Sequence[CarriedCache]) -> BatchedCarriedCache:
        made.append(len(members))
        return BatchedCarriedCache(members)

    monkeypatch.setattr("statekv.runner.batching.BatchedCarriedCache", block)
    runner = ModelRunner(small(INTERNVL))
    call = _together([_Stream(runner, 20, 30, 6) for _ in range(3)], anew)
    for _ in range(4):
        call()
    assert made == ([3] * 4 if anew else [3])


@pytest.mark.parametrize("size", FAMILIES, ids=lambda size: size.family)
def test_both_ways_take_the_same_steps(size: Size) -> None:
    runner = ModelRunner(small(size))
    streams = [_Stream(runner, 20, 30, 6) for _ in range(3)]
    pairs = [stream.stand() for stream in streams]
    forks = [state.fork() for state, _ in pairs]
    for (state, segment), fork in zip(pairs, forks, strict=True):
        fork.spans, fork.position = list(state.spans), state.position
        runner.enter(fork, segment)
    runner.prefill_batch([state for state, _ in pairs], [segment for _, segment in pairs])
    for (state, _), fork in zip(pairs, forks, strict=True):
        assert isinstance(state.carried, CarriedCache)
        assert isinstance(fork.carried, CarriedCache)
        for layer in range(3):
            assert torch.equal(state.carried.kept(layer), fork.carried.kept(layer))
            mine, its = state.detailed.keys(layer), fork.detailed.keys(layer)
            torch.testing.assert_close(mine[:, :, 30:], its[:, :, 30:], atol=ATOL, rtol=RTOL)


def test_the_demo_model_has_sizes_and_steps_of_its_own() -> None:
    model, size = replace(PLAN, name=DEMO, tokens=None).opened(CPU, torch.float32)
    weights = sum(weight.numel() for weight in model.language_model.layers.parameters())
    assert size.parameters == pytest.approx(weights, rel=0.01)
    _, *rows = measured(replace(PLAN, name=DEMO, tokens=None, sessions=(2,)))
    assert [row.setting["tokens"] for row in rows] == [9] * 3


def test_lines_are_steps_per_second() -> None:
    rows = measured()
    (panel,) = panels(rows)
    assert {name: [x for x, _ in points] for name, points in panel.lines.items()} == {
        "in turn": [1, 2, 3],
        "together": [2, 3],
        "together anew": [2, 3],
    }
    assert panel.lines["in turn"][0][1] == pytest.approx(1000 / rows[1].median)


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda _: 1 << 28)
    with pytest.raises(MemoryLimitError, match=r"15 sessions of .* would take .* \(try fewer sessions"):
        measured(replace(PLAN, budget=1 << 18))


def test_an_unknown_model_is_named() -> None:
    with pytest.raises(ConfigError, match="gpt"):
        measured(replace(PLAN, name="gpt"))
