"""A filled stream against one that has walked there."""

from __future__ import annotations

import pytest
import torch

from statekv.bench.fill import fill, fill_carried, stand
from statekv.bench.sizes import Size
from statekv.bench.steps import random_step, stride
from statekv.cache.carried import CarriedCache
from statekv.cache.stream import StreamState
from statekv.config import Config
from statekv.runner.stepper import Stepper
from tests.bench.small import FAMILIES, INTERNVL, small

TOKENS = 10  # of a step
EVERY_FAMILY = pytest.mark.parametrize("size", FAMILIES, ids=lambda size: size.family)
# Carried caches that are not yet full, exactly full, and full for long; and no carried cache at all.
EVERY_CONFIG = pytest.mark.parametrize(
    ("config", "steps"),
    [(Config(budget=64), 4), (Config(budget=40), 4), (Config(budget=16), 7), (Config.of("full"), 5)],
    ids=["growing", "just full", "long full", "all"],
)


def walked(stepper: Stepper, config: Config, steps: int) -> StreamState:
    state = stepper.open(config)
    state.detailed.reserve((steps + 1) * TOKENS)
    for number in range(1, steps + 1):
        stepper.prefill(state, random_step(stepper.model, TOKENS, number))
    if isinstance(state.carried, CarriedCache):
        state.carried.make_room(TOKENS)  # as the next step will
    return state


def filled(stepper: Stepper, config: Config, steps: int) -> StreamState:
    state = stepper.open(config)
    fill(state, steps * TOKENS, TOKENS)
    stand(state, steps * TOKENS, steps * stride(stepper.model, TOKENS), TOKENS)
    return state


def check_alike(one: StreamState, other: StreamState) -> None:
    """Lengths, shapes and position are the same, down to the slots that a full carried cache has."""
    assert one.detailed.lengths == other.detailed.lengths
    assert one.carried.lengths == other.carried.lengths
    assert one.position == other.position
    assert [buffer.shape for buffer in one.detailed.buffers] == [buffer.shape for buffer in other.detailed.buffers]
    if isinstance(one.carried, CarriedCache) and one.carried.full:
        assert isinstance(other.carried, CarriedCache)
        assert one.carried.full == other.carried.full
        assert one.nbytes == other.nbytes
        assert [slots.shape for slots in one.carried.buffers] == [slots.shape for slots in other.carried.buffers]


@EVERY_FAMILY
@EVERY_CONFIG
def test_it_is_where_walking_leads(size: Size, config: Config, steps: int) -> None:
    stepper = Stepper(small(size))
    there, brought = walked(stepper, config, steps), filled(stepper, config, steps)
    check_alike(there, brought)
    step = random_step(stepper.model, TOKENS, steps + 1)
    for state in (there, brought):
        stepper.prefill(state, step)
    check_alike(there, brought)


@EVERY_CONFIG
@torch.inference_mode()
def test_nothing_but_the_keys_sets_it_apart(config: Config, steps: int) -> None:
    """A walked stream that is given the same keys takes the same step, bit for bit."""
    stepper = Stepper(small(INTERNVL))
    there, brought = walked(stepper, config, steps), filled(stepper, config, steps)
    tokens, length = brought.tokens, brought.carried.length
    for layer in range(INTERNVL.layers):
        there.detailed.buffers[layer][..., :tokens, :] = brought.detailed.buffers[layer][..., :tokens, :]
        if isinstance(there.carried, CarriedCache) and isinstance(brought.carried, CarriedCache):
            there.carried.buffers[layer][..., :length, :] = brought.carried.buffers[layer][..., :length, :]
            there.carried.born[layer][..., :length] = brought.carried.born[layer][..., :length]
    step = random_step(stepper.model, TOKENS, steps + 1)
    assert torch.equal(stepper.prefill(there, step), stepper.prefill(brought, step))
    for layer in range(INTERNVL.layers):
        assert torch.equal(there.detailed.keys(layer), brought.detailed.keys(layer))


def test_carried_keys_are_tokens_of_the_stream() -> None:
    stepper = Stepper(small(INTERNVL))
    state = filled(stepper, Config(budget=16), 7)
    carried = state.carried
    assert isinstance(carried, CarriedCache)
    for layer in range(INTERNVL.layers):
        kept = carried.kept(layer)  # [1, kv_heads, 16]
        assert kept.unique_consecutive(dim=-1).shape[-1] == 16
        index = kept.long().unsqueeze(-1).expand(-1, -1, -1, INTERNVL.head_dim)
        held = carried.buffers[layer][0, :, :, :16]
        assert torch.equal(state.detailed.keys(layer).gather(2, index), held)


def test_keys_differ_between_tokens_heads_and_layers() -> None:
    stepper = Stepper(small(INTERNVL))
    state = filled(stepper, Config.of("full"), 3)
    keys = torch.stack([state.detailed.keys(layer)[0] for layer in range(INTERNVL.layers)])  # [layers, heads, n, D]
    assert keys.flatten(0, 2).unique(dim=0).shape[0] == keys[..., 0].numel()


def test_streams_longer_than_what_is_drawn_repeat_it() -> None:
    stepper = Stepper(small(INTERNVL))
    state = stepper.open(Config.of("full"))
    fill(state, 2500, TOKENS)
    keys = state.detailed.keys(0)
    assert keys.shape[2] == 2500
    assert torch.equal(keys[:, :, :452], keys[:, :, 2048:])
    assert keys.isfinite().all()


def test_standing_somewhere_writes_nothing() -> None:
    stepper = Stepper(small(INTERNVL))
    state = filled(stepper, Config(budget=32), 8)
    # As bits: a slot that nothing was ever written to may hold a NaN, which equals nothing.
    before = [buffer.view(torch.int32).clone() for buffer in state.carried.buffers]
    for tokens, carried in ((0, 0), (10, 10), (40, 32), (80, 32)):
        stand(state, tokens, tokens, TOKENS)
        assert (state.tokens, state.position, state.carried.length) == (tokens, tokens, carried)
    now = [buffer.view(torch.int32) for buffer in state.carried.buffers]
    assert all(torch.equal(one, other) for one, other in zip(before, now, strict=True))


def test_steps_can_be_taken_again_and_again_from_one_place() -> None:
    stepper = Stepper(small(INTERNVL))
    state = filled(stepper, Config(budget=16), 6)
    grown, addresses = state.detailed.grown, state.detailed.addresses
    step = random_step(stepper.model, TOKENS, 7)
    for _ in range(5):
        stand(state, 60, 60, TOKENS)
        stepper.prefill(state, step)
        assert (state.tokens, state.carried.length, len(state.spans)) == (70, 16, 7)
    assert (state.detailed.grown, state.detailed.addresses) == (grown, addresses)


def test_streams_may_share_one_detailed_cache() -> None:
    stepper = Stepper(small(INTERNVL))
    one, other = filled(stepper, Config.of("full"), 4), stepper.open(Config(budget=16))
    other.detailed = one.detailed
    assert isinstance(other.carried, CarriedCache)
    fill_carried(other.carried, TOKENS)
    stand(other, 40, 40, TOKENS)
    stepper.prefill(other, random_step(stepper.model, TOKENS, 5))
    assert one.tokens == other.tokens == 50
    stand(one, 40, 40, TOKENS)
    assert one.tokens == other.tokens == 40
