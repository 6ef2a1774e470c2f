"""Asking for memory before taking it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from statekv.errors import MemoryLimitError
from statekv.runner import memory
from tests.bench.small import CPU


def test_free_memory_is_what_the_system_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "meminfo"
    told.write_text("MemTotal: 9000 kB\nMemFree: 100 kB\nMemAvailable: 4000 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", told)
    assert memory.free_bytes(CPU) == 4000 * 1024
    assert memory.fits(3600 * 1024, CPU)
    assert not memory.fits(3700 * 1024, CPU)  # some is left for the work itself


def test_without_a_word_from_the_system_it_is_all_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "missing")
    assert memory.free_bytes(CPU) > 1 << 28


def test_shapes_alone_always_fit() -> None:
    assert memory.fits(1 << 60, torch.device("meta"))


def test_refusals_name_need_and_way_out() -> None:
    with pytest.raises(MemoryLimitError, match=r"^a cache would take 1048576\.0 GiB, but cpu has .* \(buy less\)$"):
        memory.check_fits("a cache", 1 << 50, CPU, "buy less")
    assert memory.refusal("a cache", 1 << 50, CPU).startswith("left out: a cache would take 1048576.0 GiB")
    assert memory.refusal("a cache", 1, CPU) == ""
