"""A cap is shared out to the byte, and one that is too small is refused with one that is not."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch

from statekv.cache.carried import CarriedCache
from statekv.cache.carry import policy_of
from statekv.cache.detailed import DetailedCache
from statekv.cache.spec import KVSpec
from statekv.cache.tiers.base import HostTier, rows_of
from statekv.cache.tiers.block import pack_block
from statekv.cache.tiers.plan import MemoryPlan, plan, step_bytes
from statekv.config import Config, bytes_of
from statekv.errors import ConfigError
from tests.cache.tiers.test_block import tokens_of
from tests.cache.tokens import CPU, kv_spec, policy

LARGE = KVSpec(kv_heads=4, head_dim=128, dtype=torch.bfloat16, devices=(CPU,) * 28)  # InternVL3-8B
TOKEN = 56 * 1024  # bytes, in all layers
GIB = 1 << 30
TIERS: list[dict[str, Any]] = [
    {},
    {"bits": 8},
    {"bits": 2},
    {"host_memory": 10**8},
    {"bits": 4, "host_memory": 10**8, "disk": 10**9},
]
DIALS: list[dict[str, Any]] = [
    {"budget": 40, "retrieve": 5},
    {"budget": 700, "retrieve": 3, "retrieve_newest": 2, "layer_slope": 0.5},
]
SETTINGS = [
    {
        "recall": recall,
        **tiers,
        **{name: value for name, value in dials.items() if recall == "retrieve" or not name.startswith("retrieve")},
    }
    for recall, tiers, dials in itertools.product(("all", "retrieve"), TIERS, DIALS)
]
EVERY_SETTING = pytest.mark.parametrize("settings", SETTINGS, ids=str)


def shared(memory: int, g: KVSpec = LARGE, prefix: int = 40, step: int = 257, room: int = 200, **s: Any) -> MemoryPlan:
    config = Config(memory=memory, **s)
    return plan(config, g, policy_of(config), prefix, step, room)


def told_least(g: KVSpec, **settings: Any) -> int:
    """What the refusal of hardly any memory asks for."""
    with pytest.raises(ConfigError) as caught:
        shared(1, g, **settings)
    found = re.search(
        r"^memory is 1 B, but a budget of \d+ and steps of 257 tokens need about ([\d.]+ \w+) \(raise",
        str(caught.value),
    )
    assert found, str(caught.value)
    assert "\n" not in str(caught.value)
    return bytes_of("memory", found[1])


def parts(found: MemoryPlan, token: int) -> int:
    beside = found.carried + found.shown + found.recent + found.representatives + found.notes
    return beside + found.quantised + found.plain * token


@EVERY_SETTING
@pytest.mark.parametrize("g", [LARGE, kv_spec(), kv_spec(layers=1, streams=3)], ids=["large", "small", "streams"])
def test_the_parts_are_the_whole_but_for_less_than_a_token(settings: dict[str, Any], g: KVSpec) -> None:
    token, least = g.streams * g.bytes_per_token, told_least(g, **settings)
    for memory in (least, least + least // 16, 2 * least, 50 * least + 3):
        found = shared(memory, g, **settings)
        assert memory - token < parts(found, token) <= memory
        assert found.answers == 200 + 257
        assert found.plain >= 40 + found.answers + 2 * 257
        assert 1 <= found.block_tokens <= max(1, (found.plain - 40 - found.answers) // 4)
        assert found.quantised >= 0
        assert found.quantised == 0 or "bits" in settings


@EVERY_SETTING
def test_the_least_that_is_told_is_near_the_least_that_does(settings: dict[str, Any]) -> None:
    """It does (above), and no more than a tenth less does not."""
    with pytest.raises(ConfigError, match="need about"):
        shared(int(0.89 * told_least(LARGE, **settings)), **settings)


def test_a_refusal_never_asks_for_what_it_says_there_is() -> None:
    """Where both would be told alike, the next amount is told."""
    for memory in (int(1.16 * GIB), int(1.19 * GIB)):
        with pytest.raises(ConfigError) as caught:
            shared(memory, budget=20_800)
        assert re.findall(r"[\d.]+ GiB", caught.value.message) == ["1.2 GiB", "1.3 GiB"]
    shared(int(1.2 * GIB), budget=20_800)


@EVERY_SETTING
def test_more_memory_is_more_of_everything(settings: dict[str, Any]) -> None:
    least = told_least(LARGE, **settings)
    plans = [shared(int(least * 1.1**power), **settings) for power in range(40)]
    for before, after in itertools.pairwise(plans):
        assert after.plain >= before.plain
        assert after.quantised >= before.quantised
        assert after.recent >= before.recent
        assert (after.most_steps or 0) >= (before.most_steps or 0)
        assert after.carried == before.carried
    assert plans[-1].plain > 2 * plans[0].plain


def test_plain_memory_by_hand() -> None:
    found = shared(8 * GIB, budget=4096)
    carried = (4096 + 257) * 28 * 4 * (2 * 128 * 2 + 8)
    steps = 1 + int(1.25 * 8 * GIB / (257 * TOKEN))
    assert found == MemoryPlan(
        carried=carried,
        shown=0,
        staged=0,
        recent=0,
        representatives=0,
        notes=steps * 768,
        quantised=0,
        plain=(8 * GIB - carried - steps * 768) // TOKEN,
        answers=457,
        most_steps=steps,
        block_tokens=18,  # 1 MiB
    )


def test_retrieval_from_four_bits_by_hand() -> None:
    found = shared(8 * GIB, budget=4096, recall="retrieve", retrieve=16, retrieve_newest=2, bits=4, disk=GIB)
    carried = (4096 + 257) * 28 * 4 * (2 * 128 * 2 + 8)
    step = 257 * TOKEN // 4 + 9 * 2 * 28 * 4 * 128 * 4  # nine groups of 32 tokens
    mean = 28 * 4 * 128 * 4
    steps = 1 + int(1.25 * 9 * GIB / step)
    shown = (40 + 18 * 257 + 457) * TOKEN
    left = 8 * GIB - carried - shown - GIB - steps * (mean + 768)
    assert found == MemoryPlan(
        carried=carried,
        shown=shown,
        staged=4096,
        recent=GIB,
        representatives=steps * mean,
        notes=steps * 768,
        quantised=left * 3 // 4,
        plain=(left - left * 3 // 4) // TOKEN,
        answers=457,
        most_steps=steps,
        block_tokens=18,
    )


def test_each_dial_takes_its_share() -> None:
    plain, tiered = shared(8 * GIB), shared(8 * GIB, host_memory=GIB)
    assert (plain.shown, plain.recent, plain.quantised) == (0, 0, 0)
    assert (tiered.staged, tiered.shown) == (4096, 2 * 4096 * TOKEN // 28)
    assert plain.plain * TOKEN - tiered.plain * TOKEN == pytest.approx(tiered.shown, abs=TOKEN)
    few, many = (shared(8 * GIB, recall="retrieve", retrieve=steps) for steps in (5, 15))
    assert many.shown - few.shown == 10 * 257 * TOKEN
    assert few.most_steps == many.most_steps == 1 + int(1.25 * 8 * GIB / (257 * TOKEN))
    assert few.recent == 0
    also = shared(8 * GIB, recall="retrieve", retrieve=5, retrieve_carried=True)
    assert also.shown - few.shown == 4096 * TOKEN
    lower = shared(8 * GIB, recall="retrieve", retrieve=5, disk=80 * GIB)
    assert lower.recent == GIB
    assert lower.most_steps == 1 + int(1.25 * 88 * GIB / (257 * TOKEN))
    endless = shared(8 * GIB, recall="retrieve", retrieve=5, disk=10**7 * GIB)
    # A quarter, and no more.
    assert endless.representatives + endless.notes == pytest.approx(2 * GIB, abs=28 * 4 * 128 * 4 + 768)


@pytest.mark.parametrize("slope", [0.0, 0.4])
@pytest.mark.parametrize("g", [kv_spec(), kv_spec(streams=2, dtype=torch.bfloat16)], ids=str)
def test_the_carried_cache_takes_what_is_planned(g: KVSpec, slope: float) -> None:
    detailed = DetailedCache(g)
    cache = CarriedCache(g, 20, policy("recent", layer_slope=slope, memory="1GiB"), detailed)
    for tokens in (5, 9, 9, 3, 9, 9, 9):
        cache.open_slots(tokens)
        for layer in range(g.layers):
            own = torch.zeros(g.streams, g.kv_heads, tokens, g.head_dim, dtype=g.dtype)
            cache.update(own, own, layer)
            cache.evict(layer, None)
    found = shared(10**6, g, prefix=0, step=9, room=5, budget=20, layer_slope=slope)
    assert cache.nbytes == found.carried


@pytest.mark.parametrize("bits", [None, 8, 4, 2])
@pytest.mark.parametrize("g", [kv_spec(dtype=torch.bfloat16), kv_spec(layers=1, streams=3)], ids=str)
def test_steps_take_what_is_said(bits: int | None, g: KVSpec) -> None:
    lengths = [1, 31, 32, 33, 64, 7, 257]
    content = pack_block(tokens_of(g, sum(lengths)), lengths, bits)
    assert HostTier().put(content, rows_of(lengths)).nbytes == sum(step_bytes(g, length, bits) for length in lengths)
