"""Bytes that exist at once, and bytes that are copied."""

from __future__ import annotations

import torch

from statekv.bench.allocation import CopiedBytes, peak_bytes

CPU = torch.device("cpu")
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

    assert peak_bytes(work, CPU) == 10 * 1024


def test_views_and_what_was_there_before_cost_nothing() -> None:
    before = torch.ones(100 * KIBI)

    def work() -> None:
        before.view(10, -1)[2:].mul_(2)
        torch.ones(KIBI).view(2, -1)[1:].transpose(0, 1)

    assert peak_bytes(work, CPU) == 1024


def test_what_is_kept_stays_counted() -> None:
    kept: list[torch.Tensor] = []
    assert peak_bytes(lambda: kept.extend(torch.ones(KIBI) for _ in range(4)), CPU) == 4 * 1024


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
