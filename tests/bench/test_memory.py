"""Bytes of real sizes, as shapes, against the formula; a step's peak on the first layers."""

from __future__ import annotations

import pytest
import torch

from statekv.bench.memory import CopiedBytes, carried_row, detailed_rows, panels, peak_bytes, peak_rows
from statekv.bench.models import SIZES, size_of
from statekv.errors import MemoryLimitError

CPU = torch.device("cpu")
MEBI = 2**20


@pytest.mark.parametrize("name", SIZES)
def test_the_detailed_cache_holds_what_the_formula_says(name: str) -> None:
    size = size_of(name)
    for row in detailed_rows(name, torch.bfloat16, [1, 4]):
        tokens = int(row.setting["steps"]) * size.tokens_per_step
        assert row.floor == 2 * size.layers * size.kv_heads * size.head_dim * 2 * tokens / MEBI
        if row.subject == "detailed holds":
            assert row.distance is not None
            # A step of a power of two is what doubling hits.
            assert row.distance == 1 if size.tokens_per_step == 256 else 1 < row.distance < 2


def test_no_token_is_copied_more_than_three_times_on_average() -> None:
    rows = detailed_rows("internvl3-1b", torch.float32, [1, 2, 3, 5, 9, 33, 100])
    copied = [row for row in rows if row.subject == "detailed copied"]
    assert len(copied) == 7
    assert all(row.distance is not None and 1 <= row.distance < 3 for row in copied)
    assert copied[0].distance == 1
    assert [row.remark for row in copied[:4]] == ["grown 0 times", "grown 1 times", "grown 2 times", "grown 3 times"]
    assert copied[-1].ratio is not None
    assert copied[-1].ratio < 0.06


def test_the_reference_concatenates_at_every_step() -> None:
    (_, copied) = detailed_rows("internvl3-1b", torch.float32, [10])
    assert copied.floor is not None
    assert copied.reference == copied.floor / 10 * sum(range(1, 11))


@pytest.mark.parametrize("budget", [100, 256, 1000])
def test_the_carried_cache_holds_the_formula_and_its_births(budget: int) -> None:
    size = size_of("qwen3-vl-2b")
    row = carried_row("qwen3-vl-2b", torch.bfloat16, budget)
    births = 4 * size.layers * size.kv_heads * (budget + 256) / MEBI
    assert row.floor == size.kv_bytes_per_token(torch.bfloat16) * (budget + 256) / MEBI
    assert row.samples == (row.floor + births,)


def test_layers_do_not_add_to_a_steps_peak() -> None:
    (two,), (four,) = (peak_rows("internvl3-1b", CPU, torch.float32, [300], layers) for layers in (2, 4))
    assert two.samples == four.samples
    assert two.distance is not None
    assert 1 <= two.distance < 4


def test_a_budget_that_does_not_fit() -> None:
    with pytest.raises(MemoryLimitError, match="a budget of 1000000000 tokens"):
        peak_rows("internvl3-1b", CPU, torch.float32, [256, 10**9])


def test_a_panel_per_model_with_every_line() -> None:
    rows = [*detailed_rows("internvl3-1b", torch.bfloat16, [1, 4]), carried_row("internvl3-1b", torch.bfloat16, 256)]
    rows += detailed_rows("internvl3-2b", torch.bfloat16, [2])
    first, second = panels(rows)
    assert first.title == "internvl3-1b"
    assert set(first.lines) == {
        "detailed holds",
        "detailed copied",
        "torch.cat would copy",
        "carried holds, B = 256",
    }
    assert all([step for step, _ in line] == [1, 4] for line in first.lines.values())
    assert second.title == "internvl3-2b"


def test_a_carried_cache_is_drawn_from_where_it_is_full() -> None:
    rows = detailed_rows("internvl3-1b", torch.bfloat16, [1, 4])
    rows += [carried_row("internvl3-1b", torch.bfloat16, budget) for budget in (512, 2048)]
    (panel,) = panels(rows)
    assert [step for step, _ in panel.lines["carried holds, B = 512"]] == [4]
    assert "carried holds, B = 2048" not in panel.lines


CPU_ALLOCATION = torch.device("cpu")
KIBI = 256  # float32


def test_the_peak_is_what_exists_at_once() -> None:
    def work() -> None:
        small = torch.ones(2 * KIBI)
        del small
        large = torch.ones(5 * KIBI)
        large.add_(1)
        doubled = large * 2
        del large, doubled
        torch.ones(3 * KIBI)

    assert peak_bytes(work, CPU_ALLOCATION) == 10 * 1024


def test_views_and_what_was_there_before_cost_nothing() -> None:
    before = torch.ones(100 * KIBI)

    def work() -> None:
        before.view(10, -1)[2:].mul_(2)
        torch.ones(KIBI).view(2, -1)[1:].transpose(0, 1)

    assert peak_bytes(work, CPU_ALLOCATION) == 1024


def test_what_is_kept_stays_counted() -> None:
    kept: list[torch.Tensor] = []
    assert peak_bytes(lambda: kept.extend(torch.ones(KIBI) for _ in range(4)), CPU_ALLOCATION) == 4 * 1024


def test_copies_and_concatenations_are_counted_by_what_they_write() -> None:
    held = torch.zeros(8 * KIBI, device="meta")
    with CopiedBytes() as copied:
        held[: 3 * KIBI] = torch.empty(3 * KIBI, device="meta")
        assert copied.total == 3 * 1024
        torch.cat([held, held])
        assert copied.total == 19 * 1024
        held.view(2, -1)
        torch.empty_like(held)
    held[:KIBI] = held[KIBI : 2 * KIBI]
    assert copied.total == 19 * 1024
