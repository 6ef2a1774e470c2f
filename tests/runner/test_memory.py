"""Asking for memory before taking it."""

from __future__ import annotations

import gc
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from statekv.cache.spec import KVSpec
from statekv.cache.stream import StreamState
from statekv.config import Config
from statekv.engine.engine import Engine
from statekv.errors import MemoryLimitError
from statekv.runner import memory
from statekv.runner.memory import Admission
from tests.presets import filled
from tests.talk import adapted, some_frames
from tests.tiny import tiny


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


CPU = torch.device("cpu")
MIB = 1 << 20
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def ten_mebibytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of memory and of disk; of memory, 9 can be had."""
    monkeypatch.setattr(memory, "free_bytes", lambda _: 10 * MIB)
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(100 * MIB, 90 * MIB, 10 * MIB))


TEN_MEBIBYTES = pytest.mark.usefixtures("ten_mebibytes")


def stream(devices: tuple[str, ...] = ("cpu", "cpu"), horizon: int = 4096, **settings: Any) -> StreamState:
    spec = KVSpec(2, 16, torch.float32, tuple(torch.device(name) for name in devices))
    return StreamState(spec, Config(**filled(settings, budget=16)), horizon, compacts=True)


@TEN_MEBIBYTES
def test_caps_add_up() -> None:
    gate, first = Admission(), stream(memory="4MiB")
    gate.admit(first)
    second = stream(memory=5 * MIB)
    gate.admit(second)
    with pytest.raises(MemoryLimitError) as found:
        gate.admit(stream(memory="1MiB"))
    assert str(found.value) == (
        "a new session may take 1.0 MiB of cpu memory, open ones 9.0 MiB more, but 9.0 MiB can be had "
        "(close a session, or give lower caps or a lower budget)"
    )
    gate.leave(first)
    gate.admit(stream(memory="4MiB"))


@TEN_MEBIBYTES
def test_who_was_refused_does_not_count() -> None:
    gate = Admission()
    with pytest.raises(MemoryLimitError):
        gate.admit(stream(memory="10MiB"))
    gate.admit(stream(memory="9MiB"))


@TEN_MEBIBYTES
def test_what_is_held_already_is_not_free_any_more_and_not_counted_twice() -> None:
    gate, first = Admission(), stream(memory="6MiB")
    gate.admit(first)
    tokens = torch.zeros(1, 2, 4 * MIB // first.spec.bytes_per_token, 16)
    for layer in range(2):
        first.detailed.append(tokens, tokens, layer)
    gate.admit(stream(memory="7MiB"))  # 6 - 4 of the first, and 7


@TEN_MEBIBYTES
def test_buffers_that_nothing_was_written_to_are_still_to_come() -> None:
    gate, first = Admission(), stream(memory="6MiB")
    gate.admit(first)
    first.detailed.make_way(8, 64, lambda _: {})
    assert first.nbytes["detailed"] > 5 * MIB
    with pytest.raises(MemoryLimitError, match=r"open ones [56]\.\d MiB more"):
        gate.admit(stream(memory="7MiB"))


@TEN_MEBIBYTES
def test_without_a_cap_the_carried_cache_counts() -> None:
    per_token = stream().spec.bytes_per_token
    fits = 9 * MIB // per_token
    Admission().admit(stream(budget=fits))
    with pytest.raises(MemoryLimitError, match="lower budget"):
        Admission().admit(stream(budget=fits + 1))
    Admission().admit(stream(carry="all"))


@TEN_MEBIBYTES
def test_a_video_that_ends_carries_no_more_than_it_has_positions() -> None:
    state = stream(budget=1 << 30)
    with pytest.raises(MemoryLimitError):
        Admission().admit(state)
    state.compacts = False
    Admission().admit(state)


@TEN_MEBIBYTES
def test_host_memory_and_memory_of_a_cpu_are_the_same() -> None:
    with pytest.raises(MemoryLimitError, match=r"10\.0 MiB of cpu memory"):
        Admission().admit(stream(memory="4MiB", host_memory="6MiB"))
    Admission().admit(stream(memory="4MiB", host_memory="5MiB"))


@TEN_MEBIBYTES
def test_layers_on_two_devices_share_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"cpu": 10 * MIB, "cuda": 2 * MIB}
    monkeypatch.setattr(memory, "free_bytes", lambda device: free[device.type])
    state = stream(memory="8MiB")
    object.__setattr__(state.spec, "devices", (CPU, CPU, CPU, torch.device("cuda", 0)))
    with pytest.raises(MemoryLimitError, match=r"2\.0 MiB of cuda memory"):
        Admission().admit(state)
    state.config = Config(budget=16, memory="7MiB")
    Admission().admit(state)


@TEN_MEBIBYTES
def test_the_disk_is_asked_where_the_files_will_lie(tmp_path: Path) -> None:
    gate = Admission()
    gate.admit(stream(memory="1MiB", disk="6MiB", disk_folder=str(tmp_path)))
    (tmp_path / "beside").mkdir()
    kept = stream(memory="1MiB", disk="4MiB", disk_folder=str(tmp_path / "beside"))
    gate.admit(kept)
    with pytest.raises(MemoryLimitError, match=f"11.0 MiB of disk at {tmp_path}"):
        Admission().admit(stream(memory="1MiB", disk="11MiB", disk_folder=str(tmp_path)))


@TEN_MEBIBYTES
def test_blocks_that_lie_on_the_disk_already_are_not_counted_twice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gate = Admission()
    there: dict[str, Any] = {"memory": "1MiB", "disk_folder": str(tmp_path)}
    first = stream(disk="6MiB", **there)
    gate.admit(first)
    monkeypatch.setattr(StreamState, "nbytes", property(lambda one: {"disk": 4 * MIB} if one is first else {}))
    with pytest.raises(MemoryLimitError, match=r"open ones 2\.0 MiB more"):
        gate.admit(stream(disk=8 * MIB + 1, **there))
    gate.admit(stream(disk=8 * MIB, **there))


@TEN_MEBIBYTES
def test_an_engine_refuses_before_anything_is_opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine = Engine(adapted(tiny("internvl")), Config(budget=20))
    one = engine.open(memory="5MiB")
    opened: list[object] = []
    monkeypatch.setattr("statekv.engine.engine.open_video", lambda *how: opened.append(how))
    for source in (None, "udp://127.0.0.1:9"):
        with pytest.raises(MemoryLimitError, match=r"may take 5\.0 MiB .*, open ones 5\.0 MiB more"):
            engine.open(source, memory="5MiB")
    assert not opened
    one.push(some_frames(2))
    one.save(tmp_path / "saved")
    with pytest.raises(MemoryLimitError):
        engine.restore(tmp_path / "saved")
    one.close()
    engine.open(memory="5MiB").close()
    forgotten = engine.open(memory="5MiB")
    del forgotten
    gc.collect()
    engine.open(memory="9MiB")


@TEN_MEBIBYTES
def test_a_fork_counts() -> None:
    engine = Engine(adapted(tiny("internvl")), Config(budget=20))
    one = engine.open(memory="4MiB")
    two = one.fork()
    with pytest.raises(MemoryLimitError, match=r"open ones 8\.0 MiB"):
        engine.open(memory="2MiB")
    two.close()
    engine.open(memory="2MiB")
