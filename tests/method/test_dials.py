"""Each dial of carry="attention" equals a computation by hand, and in its limits something plain."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from statekv.cache.archive import load_stream, save_stream
from statekv.cache.carried import CarriedCache
from statekv.config import Config
from statekv.engine.session import Session
from statekv.errors import ConfigError
from statekv.runner.runner import ModelRunner
from tests.method.byhand import ByHandDials
from tests.method.presets import DIALS
from tests.method.test_method import compare
from tests.runner.test_cuda_graph import Tape
from tests.talk import QUESTION, assert_same_memory, assert_same_stream, memory, shared_engine, some_frames
from tests.tiny import FAMILIES

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
# One frame to a step, and two: what the dials know of a family.
BOTH_STEPS = pytest.mark.parametrize("family", ["internvl", "qwen3_vl"])
EVERY_DIAL = pytest.mark.parametrize("dials", DIALS.values(), ids=DIALS)
BUDGET = 40


def opened(family: str = "internvl", **settings: Any) -> Session:
    return shared_engine(family).open(**{"budget": BUDGET, **settings})


def watched(family: str = "internvl", frames: int = 12, **settings: Any) -> Session:
    session = opened(family, **settings)
    session.push(some_frames(frames))
    return session


def carried(session: Session) -> CarriedCache:
    found = session.state.carried
    assert isinstance(found, CarriedCache)
    return found


def kept(session: Session) -> list[torch.Tensor]:
    return [carried(session).kept(layer) for layer in range(session.state.spec.layers)]


def everything(session: Session) -> list[torch.Tensor]:
    """Both memories, and the accumulated scores in the order of their tokens."""
    cache = carried(session)
    orders = [
        token_ids[..., :length].argsort(-1) for token_ids, length in zip(cache.token_ids, cache.lengths, strict=True)
    ]
    pairs = [(tensor, order) for state, order in zip(cache.state, orders, strict=True) for tensor in state.values()]
    return memory(session) + [tensor[..., : order.shape[-1]].gather(-1, order) for tensor, order in pairs]


@EVERY_DIAL
@EVERY_FAMILY
def test_a_dial_equals_the_layer_loop_by_hand(family: str, dials: dict[str, Any]) -> None:
    """Kept sets and detailed keys after every step, and what every step came out as, to 1e-5."""
    compare(family, frames=8, budget=BUDGET, by_hand=partial(ByHandDials, **dials), **dials)


@EVERY_DIAL
@BOTH_STEPS
def test_a_dial_changes_what_is_carried(family: str, dials: dict[str, Any]) -> None:
    found, paper = kept(watched(family, **dials)), kept(watched(family))
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(found, paper, strict=True))


@BOTH_STEPS
@pytest.mark.parametrize("settings", [{}, {"pin_prefix": True}], ids=str)
def test_full_coverage_is_carry_random(family: str, settings: dict[str, Any]) -> None:
    found, expected = watched(family, coverage=1, **settings), watched(family, carry="random", sinks=0, **settings)
    assert all(map(torch.equal, kept(found), kept(expected)))


def test_newest_steps_that_fill_the_budget_are_carry_recent() -> None:
    steps = [span.length for span in watched(frames=6).state.spans if span.kind == "step"]
    assert len(set(steps[-2:])) == 1
    budget = 2 * steps[-1]
    found = watched(frames=6, pin_newest=2, budget=budget)
    assert all(map(torch.equal, kept(found), kept(watched(frames=6, carry="recent", budget=budget))))


def test_pinning_more_steps_than_there_are_keeps_them_all() -> None:
    assert_same_stream(watched(budget=4000, pin_newest=100), watched(budget=4000))


@EVERY_DIAL
@BOTH_STEPS
def test_asking_changes_nothing_and_neither_does_a_peek(family: str, dials: dict[str, Any]) -> None:
    """Asked after every frame: with two frames to a step every other question peeks at one that waits."""
    asked, silent = opened(family, **dials), opened(family, **dials)
    for frame in some_frames(9):
        asked.push([frame])
        asked.ask(QUESTION, max_new_tokens=2)
        silent.push([frame])
        assert_same_stream(asked, silent)
        assert_same_memory(everything(asked), everything(silent))


@EVERY_DIAL
@BOTH_STEPS
def test_a_loaded_stream_goes_on_as_if_nothing_had_happened(family: str, dials: dict[str, Any], tmp_path: Path) -> None:
    going = watched(family, 6, **dials)
    save_stream(going.state, tmp_path / "saved")
    loaded = Session(going.runner, load_stream(tmp_path / "saved", going.state.spec))
    assert_same_memory(everything(loaded), everything(going))
    for each in (loaded, going):
        each.push(some_frames(6, seed=4))
    assert_same_memory(everything(loaded), everything(going))


@EVERY_DIAL
@BOTH_STEPS
def test_replayed_steps_equal_plain_ones(family: str, dials: dict[str, Any]) -> None:
    tape, model = Tape(), shared_engine(family).model
    config = Config(budget=BUDGET, **dials)
    mine, other = (Session(s, s.open(config)) for s in (ModelRunner(model, tape.graphs), ModelRunner(model)))
    for each in (mine, other):
        each.push(some_frames(30))
    assert_same_memory(everything(mine), everything(other))
    assert tape.replayed > tape.recorded > 0


def test_the_layers_share_one_total() -> None:
    for budget, slope in itertools.product((13, 40), (-0.6, 0.0, 0.35)):
        cache = carried(watched(budget=budget, layer_slope=slope))
        assert cache.full
        assert sum(cache.lengths) == budget * cache.spec.layers
        assert [layer.shape[-1] for layer in kept(watched(budget=budget, layer_slope=slope))] == cache.budgets


def test_a_layered_stream_takes_no_more_memory_than_a_flat_one() -> None:
    longest = max(span.length for span in watched().state.spans)
    for slope in (0.0, 0.6):
        cache = carried(watched(layer_slope=slope))
        assert sum(cache.slots) <= cache.spec.layers * (BUDGET + longest)


@pytest.mark.parametrize(
    "settings",
    [
        {"pin_newest": 5},
        {"pin_newest": 1, "coverage": 1},
        {"pin_newest": 2, "layer_slope": 0.9},
        {"pin_newest": 3, "pin_prefix": True, "budget": 33},
    ],
    ids=str,
)
def test_newest_steps_that_do_not_fit_are_refused_before_they_enter(settings: dict[str, Any]) -> None:
    session = opened(**settings)
    with pytest.raises(
        ConfigError, match=r"^pin_newest is \d with a budget of [34].*raise budget or lower pin_newest"
    ) as told:
        session.push(some_frames(6))
    assert "\n" not in str(told.value)
    before = memory(session)
    assert session.state.tokens == sum(span.length for span in session.state.spans)
    with pytest.raises(ConfigError, match=r"^pin_newest"):
        session.push(some_frames(1, seed=2))
    assert_same_memory(memory(session), before)


def test_a_prefix_must_leave_room_in_the_smallest_layer() -> None:
    with pytest.raises(ConfigError, match=r"budget is 4 \(1 in the smallest layer\), but the pinned prefix"):
        watched(budget=4, layer_slope=0.7, pin_prefix=True)
