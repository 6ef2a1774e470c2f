"""A batch of steps equals the same steps alone: logits, kept keys, both memories; and no stream sees another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from statekv.cache.carried import CarriedCache
from statekv.config import Config
from statekv.engine.engine import Engine
from statekv.engine.new_step import NewStep
from statekv.engine.session import Session
from statekv.runner.batches import likeness
from statekv.runner.together import gather, prefill_together
from statekv.video.frame import Frame
from tests.gpu import need_gpu
from tests.talk import QUESTION, assert_same_memory, memory, shared_engine, some_frames
from tests.tiny import EVERY_MODEL, FAMILIES

SETTINGS: dict[str, dict[str, Any]] = {
    "attention": {},
    "pinned": {"budget": 40, "pin_prefix": True},
    "recent": {"carry": "recent"},
    "random": {"carry": "random"},
    "streaming_llm": {"method": "streaming_llm"},
    "retrieve": {"method": "statekv_retrieve", "retrieve": 2},
    "decay": {"decay": 0.5},
    "newest and coverage": {"budget": 60, "pin_newest": 2, "coverage": 0.25},
    "slope": {"layer_slope": 0.4},
    "sampled scores": {"score_every": 2},
}
STEPS = 8
ATOL, RTOL = 2e-5, 1e-4  # float32 products of other shapes round differently


def opened(family: str, **settings: Any) -> Session:
    return shared_engine(family).open(**{"budget": 20, **settings})


def films(family: str, streams: int, steps: int = STEPS) -> list[list[Frame]]:
    per_step = shared_engine(family).model.frames_per_step
    return [some_frames(steps * per_step, seed=seed) for seed in range(streams)]


def entered(sessions: Sequence[Session], films: Sequence[Sequence[Frame]], number: int) -> list[NewStep]:
    """Step `number` of each session, looked at and placed."""
    steps = []
    for session, film in zip(sessions, films, strict=True):
        per_step = session.stepper.model.frames_per_step
        for frame in film[number * per_step : (number + 1) * per_step]:
            step = session.feed.put(frame)
        assert isinstance(step, NewStep)
        step.enter()
        steps.append(step)
    return steps


def push_together(sessions: Sequence[Session], films: Sequence[Sequence[Frame]], first: int, last: int) -> None:
    """Steps `first` … `last` - 1 as batches; each must be possible as one."""
    stepper = sessions[0].stepper
    states = [session.state for session in sessions]
    for number in range(first, last):
        steps = entered(sessions, films, number)
        alike = {likeness(stepper.model, step.state, step.segments) for step in steps}
        if number:
            assert len(alike) == 1
            assert None not in alike
            assert gather(stepper, states)
            prefill_together(stepper, states, [step.segments[0] for step in steps])
        else:
            for step in steps:
                step.prefill()
        for session, step in zip(sessions, steps, strict=True):
            session.feed.finish(step)


def assert_close(found: Session, expected: Session) -> None:
    """Kept sets and numbers equal, keys and values within rounding."""
    a, b = found.state, expected.state
    assert (a.position, a.frames, a.origin_seconds, a.spans) == (b.position, b.frames, b.origin_seconds, b.spans)
    assert a.nbytes["detailed"] == b.nbytes["detailed"]
    for mine, its in zip(memory(found), memory(expected), strict=True):
        if mine.dtype == torch.int32:
            assert torch.equal(mine, its)
        else:
            torch.testing.assert_close(mine, its, atol=ATOL, rtol=RTOL)
    torch.testing.assert_close(found.logits(QUESTION), expected.logits(QUESTION), atol=1e-4, rtol=1e-4)
    assert found.ask(QUESTION) == expected.ask(QUESTION)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_equals_streams_alone(family: str, settings: dict[str, Any]) -> None:
    shown = films(family, 3)
    together, alone = ([opened(family, **settings) for _ in shown] for _ in range(2))
    push_together(together, shown, 0, STEPS)
    for session, film in zip(alone, shown, strict=True):
        session.push(film)
    evicted = together[0].state.tokens > together[0].state.carried.length
    assert evicted
    for found, expected in zip(together, alone, strict=True):
        assert_close(found, expected)


@pytest.mark.parametrize("family", sorted(set(EVERY_MODEL) - set(FAMILIES)))
def test_a_batch_equals_streams_alone_in_kindred_models(family: str) -> None:
    shown = films(family, 2)
    together, alone = ([opened(family) for _ in shown] for _ in range(2))
    push_together(together, shown, 0, STEPS)
    for session, film, found in zip(alone, shown, together, strict=True):
        session.push(film)
        assert_close(found, session)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_stream_sees_what_another_holds(family: str) -> None:
    """To the bit: in a batch of the same size, a stream is the same whatever the others are."""
    first, second, third = films(family, 3)
    one, other = ([opened(family) for _ in range(3)] for _ in range(2))
    push_together(one, [first, second, third], 0, STEPS)
    push_together(other, [first, third, second], 0, STEPS)
    assert_same_memory(memory(one[0]), memory(other[0]))
    assert torch.equal(one[0].logits(QUESTION), other[0].logits(QUESTION))


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_on_cuda_a_batch_equals_streams_alone(family: str) -> None:
    """Not run without a GPU. Alone, full caches are stepped by recorded graphs, in between on rows of the block."""
    need_gpu()
    model = shared_engine(family).model.model
    model.cuda()
    try:
        engine = Engine(shared_engine(family).model, Config(budget=20, max_new_tokens=6))
        shown = films(family, 3, 12)
        together, alone = ([engine.open() for _ in shown] for _ in range(2))
        push_together(together, shown, 0, 6)
        per_step = engine.model.frames_per_step
        for session, film in zip(together, shown, strict=True):
            session.push(film[6 * per_step : 9 * per_step])
        push_together(together, shown, 9, 12)
        for session, film in zip(alone, shown, strict=True):
            session.push(film)
        for found, expected in zip(together, alone, strict=True):
            for layer in range(found.state.geometry.layers):
                assert isinstance(found.state.carried, CarriedCache)
                assert isinstance(expected.state.carried, CarriedCache)
                assert torch.equal(found.state.carried.kept(layer), expected.state.carried.kept(layer))
                mine, its = found.state.detailed.keys(layer), expected.state.detailed.keys(layer)
                torch.testing.assert_close(mine, its, atol=1e-4, rtol=1e-4)
    finally:
        model.cpu()
