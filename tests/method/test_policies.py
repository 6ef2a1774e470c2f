"""Each policy and each dial equals a layer loop by hand, in its limits something plain, and loses nothing it knows."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from statekv.cache.carried import CarriedCache
from statekv.cache.policies import Candidates, Policy
from statekv.cache.stream import StreamState
from statekv.config import CARRIES, Config
from statekv.engine.session import Session
from statekv.errors import ConfigError
from statekv.models.adapter import Segment
from statekv.runner.runner import ModelRunner
from tests.method.byhand import ByHandDials
from tests.method.byhand.policies import (
    ByHandAccumulated,
    ByHandAdaKV,
    ByHandCaote,
    ByHandDoubled,
    ByHandKeyNorm,
    ByHandRandom,
    ByHandStochastic,
    ByHandTokens,
    ByHandWeighted,
)
from tests.method.test_method import compare, tokens_of
from tests.presets import DIALS
from tests.runner.test_cuda_graph import Tape
from tests.talk import (
    QUESTION,
    assert_same_memory,
    assert_same_stream,
    memory,
    session_answer,
    shared_engine,
    some_frames,
)
from tests.tiny import TWO_FAMILIES

BOTH_STEPS = pytest.mark.parametrize("family", TWO_FAMILIES)  # one frame to a step, and two
EVERY_DIAL = pytest.mark.parametrize("dials", DIALS.values(), ids=DIALS)
BUDGET = 40


@dataclass(frozen=True)
class Doubled(Policy):
    """Keeps even tokens before odd ones; a kept key stands for two."""

    needs_attention = True
    weighs = True

    def score(self, candidates: Candidates) -> torch.Tensor:
        return candidates.attended + 1000 * (candidates.token_ids % 2 == 0)

    def log_weights(self, candidates: Candidates, scores: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, math.log(2))


# How each policy is spelled or given, and its loop by hand.
BY_HAND: dict[str, tuple[Any, type[ByHandTokens], dict[str, Any], dict[str, Any]]] = {
    "random": ("random", ByHandRandom, {"sinks": 4, "seed": 3}, {"seed": 3}),
    "key_norm": ("key_norm", ByHandKeyNorm, {}, {}),
    "sum": ("accumulated(decay=1)", ByHandAccumulated, {"decay": 1, "maximum": False}, {}),
    "decay": ("accumulated(decay=0.5)", ByHandAccumulated, {"decay": 0.5, "maximum": False}, {}),
    "maximum": ("accumulated(decay=0.8, maximum=True)", ByHandAccumulated, {"decay": 0.8, "maximum": True}, {}),
    "caote": ("caote", ByHandCaote, {}, {}),
    "caote, sinks": ("caote", ByHandCaote, {"sinks": 3}, {"sinks": 3}),
    "ada_kv": ("ada_kv", ByHandAdaKV, {"floor": 0.2, "most": 2.0}, {}),
    "ada_kv, free": ("ada_kv(floor=0.0, most=1.5)", ByHandAdaKV, {"floor": 0.0, "most": 1.5}, {}),
    "stochastic": ("stochastic(temperature=0.5)", ByHandStochastic, {"temperature": 0.5, "seed": 7}, {"seed": 7}),
    "doubled": (Doubled(), ByHandDoubled, {}, {}),
    **{
        f"weighted, {name}": (
            f"weighted(cap={cap}, output_error={error})",
            ByHandWeighted,
            {"cap": cap, "output_error": error, "sinks": 4, "seed": 5},
            {"seed": 5},
        )
        for name, cap, error in (("attention", 4.0, False), ("output error", 3.0, True), ("low cap", 0.5, False))
    },
}


@pytest.mark.parametrize("name", BY_HAND)
@BOTH_STEPS
def test_a_policy_equals_the_layer_loop_by_hand(family: str, name: str) -> None:
    """Kept sets and detailed keys after every step, and what every step came out as, to 1e-5."""
    carry, loop, parameters, settings = BY_HAND[name]
    # InternVL's labels repeat words, whose keys are equally long in the first layer: none of them may be on the line.
    budget = 12 if (family, name) == ("internvl", "key_norm") else 24
    compare(family, frames=8, budget=budget, by_hand=partial(loop, **parameters), carry=carry, **settings)


@EVERY_DIAL
@BOTH_STEPS
def test_a_dial_equals_the_layer_loop_by_hand(family: str, dials: dict[str, Any]) -> None:
    """Kept sets and detailed keys after every step, and what every step came out as, to 1e-5."""
    compare(family, frames=8, budget=BUDGET, by_hand=partial(ByHandDials, **dials), **dials)


def opened(family: str = "internvl", **settings: Any) -> Session:
    return shared_engine(family).open(**{"budget": BUDGET, **settings})


def watched(family: str = "internvl", frames: int = 8, **settings: Any) -> Session:
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


def all_that_was(session: Session) -> list[torch.Tensor]:
    """Detailed keys and values of all layers."""
    detailed = session.state.detailed
    return [each(layer) for layer in range(session.state.spec.layers) for each in (detailed.keys, detailed.values)]


def assert_close(found: Session, expected: Session) -> None:
    """The same sets, and what is not a number of a token within rounding."""
    for a, b in zip(kept(found), kept(expected), strict=True):
        assert tokens_of(a) == tokens_of(b)
    for a, b in zip(all_that_was(found), all_that_was(expected), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.logits(QUESTION), expected.logits(QUESTION), atol=1e-3, rtol=1e-3)


# Limits


@pytest.mark.parametrize("carry", CARRIES)
@BOTH_STEPS
def test_an_unlimited_budget_is_full_attention(family: str, carry: str) -> None:
    """To the bit, but where each step is scored: scores come with products of their own."""
    found, full = watched(family, carry=carry, budget=100_000), shared_engine(family).open(method="full")
    full.push(some_frames(found.frames))
    assert carried(found).length == found.state.tokens
    assert found.state.policy is not None
    if found.state.policy.every_step:
        for a, b in zip(all_that_was(found), all_that_was(full), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    else:
        assert_same_memory(all_that_was(found), all_that_was(full))
        assert torch.equal(found.logits(QUESTION), full.logits(QUESTION))


@pytest.mark.parametrize(
    ("carry", "budget"),
    [
        ("stochastic(temperature=0)", BUDGET),
        ("ada_kv(floor=1.0, most=1.0)", BUDGET),
        # Less than the prefix: steps before the first eviction are scored too, by a kernel that rounds differently.
        ("accumulated(decay=0)", 3),
        ("accumulated(decay=0, maximum=True)", 3),
    ],
)
@BOTH_STEPS
def test_in_its_limit_a_policy_is_the_paper_to_the_bit(family: str, carry: str, budget: int) -> None:
    found, paper = (watched(family, carry=each, budget=budget) for each in (carry, "attention"))
    assert all(map(torch.equal, kept(found), kept(paper)))
    assert_same_memory(all_that_was(found), all_that_was(paper))
    assert torch.equal(found.logits(QUESTION), paper.logits(QUESTION))


@pytest.mark.parametrize("carry", ["ada_kv(floor=1.0)", "accumulated(decay=0)"])
@BOTH_STEPS
def test_in_its_limit_a_policy_keeps_what_the_paper_keeps(family: str, carry: str) -> None:
    """With more slots than are filled, or more steps that are scored, sums are taken in another order."""
    assert_close(watched(family, carry=carry), watched(family, carry="attention"))


@pytest.mark.parametrize(
    ("method", "sinks"),
    [("random", 4), ("streaming_llm", 4), ("recency_window", 0), ("statekv", 0), ("statekv_weighted", 4)],
)
def test_who_keeps_sinks_by_itself(method: str, sinks: int) -> None:
    found, without = watched("internvl", method=method), watched("internvl", method=method, sinks=0)
    for layer, plain in zip(kept(found), kept(without), strict=True):
        assert (layer[..., :sinks] == torch.arange(sinks)).all()
        assert torch.equal(layer, plain) == (sinks == 0)


@pytest.mark.parametrize("carry", CARRIES)
def test_sinks_are_an_option_of_every_policy(carry: str) -> None:
    for layer in kept(watched("internvl", carry=carry, sinks=5)):
        assert all(head[:5] == [0, 1, 2, 3, 4] for head in tokens_of(layer))


@EVERY_DIAL
def test_a_dial_changes_what_is_carried(dials: dict[str, Any]) -> None:
    found, paper = kept(watched(**dials)), kept(watched())
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


# Budgets


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


BOUNDS = [(0.2, 2.0), (0.0, 2.0), (0.5, 1.5), (1.0, 1.0)]
BESIDE: list[dict[str, Any]] = [{}, {"layer_slope": 0.5}, {"sinks": 3}, {"pin_newest": 1, "coverage": 0.2}]


@pytest.mark.parametrize(
    ("family", "floor", "most", "settings"),
    [
        *(("internvl", *bounds, settings) for bounds in BOUNDS for settings in BESIDE),
        *(("qwen3_vl", *bounds, settings) for bounds, settings in zip(BOUNDS, BESIDE, strict=True)),
    ],
    ids=str,
)
def test_heads_share_out_exactly_the_layers_budget(
    family: str, floor: float, most: float, settings: dict[str, Any]
) -> None:
    session = shared_engine(family).open(carry=f"ada_kv(floor={floor}, most={most})", budget=40, **settings)
    uneven = False
    for frame in some_frames(8):
        session.push([frame])
        cache = carried(session)
        for layer, share in enumerate(cache.shares):
            alive = (cache.kept(layer)[0] >= 0).sum(-1)
            assert int(alive.sum()) == len(alive) * min(share, session.state.tokens)
            assert int(alive.min()) >= min(int(floor * share), session.state.tokens)
            assert int(alive.max()) <= int(most * share)
            uneven |= int(alive.min()) < int(alive.max())
    assert uneven == (floor < 1)


def spoiled(session: Session) -> Session:
    """Its empty slots hold nonsense, beside which nothing else could be seen."""
    cache, empty = carried(session), 0
    with torch.inference_mode():
        for layer, length in enumerate(cache.lengths):
            gone = cache.token_ids[layer][..., :length] < 0
            empty += int(gone.sum())
            cache.buffers[layer][:, :, :, :length].masked_fill_(gone[None, ..., None], 1e3)
            for name, tensor in cache.state[layer].items():
                if name != "log_weights":
                    tensor[..., :length].masked_fill_(gone, 1e9)
    assert empty
    return session


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"decay": 0.5, "value_norms": True, "coverage": 0.2},
        {"recall": "retrieve", "retrieve": 2, "retrieve_carried": True},
        {"horizon": 160, "on_horizon": "compact"},
        {"memory": "4MiB"},
    ],
    ids=str,
)
@BOTH_STEPS
def test_nobody_sees_an_empty_slot(family: str, settings: dict[str, Any]) -> None:
    """Neither steps nor answers nor those that weigh segments or turn keys, and nothing comes back out of one."""
    found, expected = (watched(family, carry="ada_kv", **settings) for _ in range(2))
    for frame in some_frames(6, seed=4):
        spoiled(found).push([frame])
        expected.push([frame])
        assert all(tokens_of(a) == tokens_of(b) for a, b in zip(kept(found), kept(expected), strict=True))
        assert torch.equal(found.logits(QUESTION), expected.logits(QUESTION))
        if found.state.config.memory is not None:
            starts = [span.start for span in found.state.spans if span.length]
            assert carried(found).importance(starts) == carried(expected).importance(starts)
    assert_same_memory(all_that_was(found), all_that_was(expected))


# What a policy remembers or draws

REMEMBERING: dict[str, dict[str, Any]] = {
    "accumulated": {"carry": "accumulated"},
    "maximum": {"carry": "accumulated(decay=0.9, maximum=True)"},
    "importance": {"memory": "4MiB"},
    "stochastic": {"carry": "stochastic", "seed": 5},
    "weighted": {"carry": "weighted", "seed": 5},
    "random": {"carry": "random", "seed": 5},
    "ada_kv": {"carry": "ada_kv"},
    "ada_kv, all": {"carry": "ada_kv", "decay": 0.5, "value_norms": True, "layer_slope": 0.3, "coverage": 0.2},
    "weights": {"carry": f"{__name__}:Doubled"},
    **DIALS,
}
# Of the dials, each of which equals its loop by hand, the one that takes most slots and all of them together.
TOGETHER = [name for name in REMEMBERING if name not in DIALS or name in ("newest steps", "every dial")]
# With two frames to a step: those whose steps take most with them, and the paper's policy beside them.
WITH_PAIRS = ("accumulated", "ada_kv, all", "every dial")
EVERY_MEMORY_AND_PAIRS = pytest.mark.parametrize(
    ("family", "name"),
    [*(("internvl", name) for name in TOGETHER), *(("qwen3_vl", name) for name in WITH_PAIRS)],
)
FRAMES = 10


@functools.cache
def plain(family: str, name: str, frames: int = FRAMES, seed: int = 0) -> Session:
    """A stream of its own that was never disturbed; shared, to be left as found."""
    session = opened(family, **REMEMBERING[name])
    session.push(some_frames(frames, seed))
    return session


@pytest.mark.parametrize(
    ("family", "name"),
    [*(("qwen3_vl", name) for name in REMEMBERING), *(("internvl", name) for name in WITH_PAIRS)],
)
def test_asking_changes_nothing_and_neither_does_a_peek(family: str, name: str) -> None:
    """Asked after every frame: with two frames to a step every other question peeks at one that waits."""
    asked, silent = (opened(family, **REMEMBERING[name]) for _ in range(2))
    for frame in some_frames(7):
        asked.push([frame])
        asked.ask(QUESTION, max_new_tokens=2)
        silent.push([frame])
        assert_same_stream(asked, silent)
        assert_same_memory(everything(asked), everything(silent))


@EVERY_MEMORY_AND_PAIRS
def test_forks_and_restored_streams_go_on_as_if_nothing_had_happened(family: str, name: str, tmp_path: Path) -> None:
    never, going = plain(family, name), opened(family, **REMEMBERING[name])
    frames, half = some_frames(FRAMES), FRAMES // 2
    going.push(frames[:half])
    fork = going.fork()
    going.save(tmp_path)
    restored = shared_engine(family).restore(tmp_path)
    for session in (going, fork, restored):
        session.push(frames[half:])
        assert_same_memory(everything(session), everything(never))
        assert torch.equal(session.logits(QUESTION), never.logits(QUESTION))


@EVERY_MEMORY_AND_PAIRS
def test_three_streams_in_one_batch_are_as_each_alone(family: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, sizes, run = shared_engine(family), list[int](), ModelRunner.prefill_batch

    def counted(runner: ModelRunner, states: Sequence[StreamState], segments: Sequence[Segment]) -> torch.Tensor:
        sizes.append(len(states))
        return run(runner, states, segments)

    monkeypatch.setattr(ModelRunner, "prefill_batch", counted)
    together = [opened(family, **REMEMBERING[name]) for _ in range(3)]
    for seed, session in enumerate(together):
        session.source = iter(some_frames(FRAMES, seed))
    assert not engine.watch_all(together)
    assert max(sizes) == 3
    for seed, session in enumerate(together):
        assert_close(session, plain(family, name, seed=seed))


@EVERY_MEMORY_AND_PAIRS
def test_replayed_steps_equal_plain_ones(family: str, name: str) -> None:
    frames = 18 if family == "internvl" else 30
    tape, model, other = Tape(), shared_engine(family).model, plain(family, name, frames)
    runner = ModelRunner(model, tape.graphs)
    mine = Session(runner, runner.open(Config.of(**{"budget": BUDGET, **REMEMBERING[name]})))
    mine.push(some_frames(frames))
    assert_same_memory(everything(mine), everything(other))
    assert torch.equal(session_answer(mine).logits, session_answer(other).logits)
    assert tape.replayed > tape.recorded > 0
