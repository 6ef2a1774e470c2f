"""Blocks go down tier by tier, oldest first; at the last one the least steps are forgotten; no cap is passed."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from statekv.cache.tiers.base import GROUP, Content
from statekv.cache.tiers.block import SegmentEntry, pack_block, read_steps
from statekv.cache.tiers.manager import TierManager
from statekv.cache.tiers.plan import step_bytes
from statekv.config import Config
from statekv.errors import StorageWarning
from statekv.ops.quantise import dequantise, quantise
from tests.cache.test_folder import files_of_at_most
from tests.cache.tokens import CPU, keys, kv_spec, values

G = kv_spec(layers=2)
FOREVER = 1 << 40


def manager(device: int = 0, **tiers: Any) -> TierManager:
    found = TierManager(G, Config(memory=FOREVER, **tiers))
    found.allow(device)
    return found


def tokens_of(step: SegmentEntry, layer: int) -> torch.Tensor:
    """[2, streams, kv_heads, N, head_dim]"""
    numbers = range(step.start, step.start + step.length)
    return torch.stack([keys(G, layer, numbers), values(G, layer, numbers)])


def content_of(steps: Sequence[SegmentEntry], bits: int | None = None) -> list[Content]:
    layers = [torch.cat([tokens_of(step, layer) for step in steps], dim=-2) for layer in range(G.layers)]
    return pack_block(layers, [step.length for step in steps], bits)


class Stream:
    """Blocks of steps of random lengths and worths, and what has become of them."""

    def __init__(self, on: TierManager, bits: int | None = None, seed: int = 0) -> None:
        self.on, self.bits, self.draw = on, bits, random.Random(seed)
        self.steps: dict[int, SegmentEntry] = {}
        self.gone: list[int] = []
        self.tokens = 0

    def put(self, lengths: Sequence[int] = (), importance: Sequence[float] = ()) -> list[SegmentEntry]:
        """A block, drawn where no lengths are given; returns its steps."""
        lengths = lengths or [self.draw.randint(1, 40) for _ in range(self.draw.randint(1, 4))]
        importance = importance or [self.draw.choice((0.0, self.draw.random())) for _ in lengths]
        block = []
        for length, worth in zip(lengths, importance, strict=True):
            block.append(SegmentEntry(self.tokens, length, "step", 0, worth))
            self.steps[self.tokens] = block[-1]
            self.tokens += length
        self.gone += (step.start for step in self.on.put(content_of(block, self.bits), block))
        return block

    def drop(self, steps: Sequence[SegmentEntry]) -> None:
        self.gone += [step.start for step in [*steps, *self.on.drop(steps)]]

    def layout(self) -> list[list[list[int]]]:
        """Starts of the steps in each block of each tier."""
        return [[[step.start for step in its] for its in share.blocks.values()] for share in self.on._shares]

    def check(self) -> None:
        """Every step is in one block or forgotten, no cap is passed, and whoever says where it is is right."""
        for share in self.on._shares:
            assert share.nbytes == sum(block.held.nbytes for block in share.blocks) <= share.cap
            assert self.on.nbytes[share.tier.name] == share.nbytes
            for block, its in share.blocks.items():
                assert [(step.block, step.row) for step in its] == [(block, row) for row in range(len(block.rows))]
                assert [step.length for step in its] == [rows.tokens for rows in block.rows]
        held = [start for tier in self.layout() for block in tier for start in block]
        assert sorted([*held, *self.gone]) == list(self.steps)
        assert all(self.steps[start].block is None for start in self.gone)
        assert len(self.on) == sum(map(len, self.layout()))

    def check_reads(self) -> None:
        """All that is held is as it was put in."""
        for step in self.steps.values():
            for layer in range(G.layers if step.block is not None else 0):
                found = read_steps([(step.offloaded, step.row)], layer, self.bits, CPU, G.dtype)
                tokens = tokens_of(step, layer).permute(3, 0, 1, 2, 4)
                if self.bits is not None:
                    tokens = dequantise(quantise(tokens, self.bits, GROUP), 0, step.length, G.dtype)
                assert torch.equal(found, tokens)


class Model:
    """What is to become of blocks, in plain lists of (worth, start, length)."""

    def __init__(self, caps: Sequence[int], bits: int | None) -> None:
        self.caps, self.bits = caps, bits
        self.tiers: list[list[list[tuple[float, int, int]]]] = [[] for _ in caps]

    def bytes(self, blocks: Sequence[Sequence[tuple[float, int, int]]]) -> int:
        return sum(step_bytes(G, length, self.bits) for block in blocks for _, _, length in block)

    def put(self, block: list[tuple[float, int, int]], number: int = 0) -> None:
        tier, last = self.tiers[number], number + 1 == len(self.tiers)
        while not last and tier and self.bytes([*tier, block]) > self.caps[number]:
            self.put(tier.pop(0), number + 1)
        if not last and self.bytes([block]) > self.caps[number]:
            self.put(block, number + 1)
            return
        tier.append(block)
        while self.bytes(tier) > self.caps[number]:
            least = min(step for each in tier for step in each)
            tier[:] = [[step for step in each if step != least] for each in tier]
        tier[:] = [each for each in tier if each]


@pytest.mark.parametrize(
    ("bits", "caps"),
    [
        (None, [30_000]),
        (None, [2_000]),
        (4, [9_000]),
        (4, [5_000, 9_000]),
        (2, [0, 9_000]),
        (8, [900, 20_000]),
        (8, [9_000, 900]),
    ],
    ids=str,
)
@pytest.mark.parametrize("below", ["host_memory", "disk"])
def test_becomes_of_blocks_what_plain_lists_say(bits: int | None, caps: list[int], below: str, tmp_path: Path) -> None:
    last: dict[str, Any] = {below: caps[-1]} if bits is None or len(caps) > 1 else {}
    if "disk" in last:
        last["disk_folder"] = str(tmp_path)
    stream, model = Stream(manager(caps[0], bits=bits, **last), bits, seed=sum(caps)), Model(caps, bits)
    for _ in range(100):
        block = stream.put()
        model.put([(step.worth, step.start, step.length) for step in block])
        stream.check()
        expected = [[[start for _, start, _ in block] for block in tier] for tier in model.tiers]
        assert [sorted(tier) for tier in stream.layout()] == [sorted(tier) for tier in expected]
        assert sum(path.stat().st_size for path in tmp_path.rglob("blocks")) <= caps[-1]
    assert stream.gone
    stream.check_reads()


@pytest.mark.parametrize("seed", range(3))
def test_older_blocks_lie_further_down_whatever_is_dropped(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    caps = [draw.randint(2_000, 9_000) for _ in range(2)]
    on = manager(caps[0], bits=4, host_memory=caps[1], disk=40_000, disk_folder=str(tmp_path))
    stream = Stream(on, 4, seed)
    for _ in range(80):
        stream.put()
        stream.check()
        if draw.random() < 0.3:
            held = [step for step in stream.steps.values() if step.block is not None]
            stream.drop(draw.sample(held, min(len(held), draw.randint(1, 8))))
            stream.check()
        device, host, below = ([start for block in tier for start in block] for tier in stream.layout())
        assert device == sorted(device)
        assert host == sorted(host)
        assert min(device, default=FOREVER) > max(host, default=-1)
        assert min(host, default=min(device, default=FOREVER)) > max(below, default=-1)
    assert all(stream.layout())
    assert [path.stat().st_size <= 40_000 for path in tmp_path.rglob("blocks")] == [True]
    stream.check_reads()


def test_a_step_that_has_no_room_at_all_is_forgotten() -> None:
    for on, bits in (
        (manager(host_memory=1_000), None),
        (manager(0, bits=4), 4),
        (manager(0, bits=4, host_memory=10), 4),
    ):
        stream = Stream(on, bits)
        stream.put([20, 30])
        stream.check()
        assert (sorted(stream.gone), len(on)) == ([0, 20], 0)


def test_where_there_is_no_tier_there_is_no_shelf() -> None:
    assert not manager().open
    assert manager().nbytes == {}
    assert manager(bits=8).open


# Forks


def test_a_fork_shares_blocks_and_nothing_else(tmp_path: Path) -> None:
    stream = Stream(manager(3_000, bits=4, host_memory=3_000, disk=40_000, disk_folder=str(tmp_path)), 4)
    for _ in range(12):
        stream.put()
    assert all(stream.layout())
    other = Stream(stream.on, 4, seed=1)
    other.steps = {start: replace(step) for start, step in stream.steps.items()}
    other.on, other.tokens, other.gone = stream.on.fork(other.steps), stream.tokens, list(stream.gone)
    assert other.layout() == stream.layout()
    assert all(other.steps[start].block is step.block for start, step in stream.steps.items())
    for changed, left_alone in ((stream, other), (other, stream)):
        before, nbytes = left_alone.layout(), left_alone.on.nbytes
        for _ in range(6):
            changed.put()
            changed.drop([step for step in changed.steps.values() if step.block is not None][::5])
        for each in (changed, left_alone):
            each.check()
            each.check_reads()
        assert (left_alone.layout(), left_alone.on.nbytes) == (before, nbytes)
    del stream.on, changed, left_alone, other
    stream.steps.clear()
    assert list(tmp_path.iterdir()) == []


# Faults


def test_a_full_disk_lowers_the_cap_once_and_the_stream_goes_on(tmp_path: Path) -> None:
    stream = Stream(manager(disk=10**6, disk_folder=str(tmp_path)))
    with files_of_at_most(40_000), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(60):
            stream.put()
            stream.check()
        assert stream.put([9], [2.0])[0].block is not None
    assert [warning.category for warning in told] == [StorageWarning]
    text = str(told[0].message)
    assert "File too large; from now on disk holds" in text
    assert "\n" not in text
    assert 20_000 < stream.on._shares[0].cap < 40_000
    assert stream.gone
    assert stream.on.nbytes["disk"] > stream.on._shares[0].cap * 0.8  # it goes on to be used
    stream.check_reads()


def test_a_disk_that_takes_nothing_leaves_blocks_nowhere(tmp_path: Path) -> None:
    stream = Stream(manager(host_memory=2_000, disk=10**6, disk_folder=str(tmp_path)))
    with files_of_at_most(0), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(20):
            stream.put([5, 5])
            stream.check()
    assert [warning.category for warning in told] == [StorageWarning]
    assert stream.layout() == [[[190, 195]], []]
    assert sorted(stream.gone) == list(range(0, 190, 5))


def test_a_damaged_step_leaves_without_the_others(tmp_path: Path) -> None:
    """Nothing is read for it."""
    stream = Stream(manager(disk=10**6, disk_folder=str(tmp_path)))
    steps = stream.put([3, 4, 5])
    (path,) = tmp_path.rglob("blocks")
    path.write_bytes(bytes(100) + path.read_bytes()[100:])
    stream.drop(steps[:1])
    stream.check()
    assert stream.gone == [steps[0].start]
    stream.check_reads()
