"""One segment at a time: what is checked before it enters, what an answer yields, which errors are memory's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from statekv.cache.stream import StreamState
from statekv.config import Config
from statekv.errors import ConfigError, HorizonError, MemoryLimitError
from statekv.runner.decoding import Sampling
from statekv.runner.memory import memory_limit
from statekv.runner.stepper import Stepper
from tests.talk import QUESTION, entering, shared_engine, some_frames
from tests.tiny import FAMILIES

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


def fed(stepper: Stepper, frames: int = 4, **settings: Any) -> StreamState:
    """A stream of `frames` pictures."""
    state = stepper.open(Config(**{"budget": 20, **settings}))
    pictures, per_step = some_frames(frames), stepper.model.frames_per_step
    with torch.inference_mode():
        for start in range(0, frames, per_step):
            for segment in entering(stepper.model, pictures[start : start + per_step], state):
                stepper.prefill(state, segment)
    return state


@EVERY_FAMILY
def test_open_takes_the_settings_horizon_then_the_files_then_the_trained_length(family: str) -> None:
    stepper = shared_engine(family).stepper
    assert stepper.open(Config()).horizon == 4096
    assert stepper.open(Config(), 9000).horizon == 9000
    assert stepper.open(Config(horizon=300), 9000).horizon == 300


@EVERY_FAMILY
def test_spans_say_where_each_segment_lies(family: str) -> None:
    state = fed(shared_engine(family).stepper)
    kinds = [span.kind for span in state.spans]
    assert kinds == ["prefix"] + ["step"] * (len(kinds) - 1)
    assert [span.start for span in state.spans] == [sum(s.length for s in state.spans[:i]) for i in range(len(kinds))]
    assert sum(span.length for span in state.spans) == state.tokens
    times = [span.pts_seconds for span in state.spans]
    step = float(shared_engine(family).model.frames_per_step)
    assert times == ([None, 0.0, 1.0, 2.0, 3.0] if step == 1 else [None, 0.0, 2.0])
    assert (state.frames, state.origin_seconds) == (4, 0.0)
    if step == 1:
        assert state.position == state.tokens
    else:
        assert state.position < state.tokens


@EVERY_FAMILY
def test_a_segment_may_reach_the_horizon_but_not_pass_it(family: str) -> None:
    stepper = shared_engine(family).stepper
    state = fed(stepper)
    segment = stepper.model.question(QUESTION, state)
    state.horizon = segment.next_position
    mark = state.mark()
    stepper.prefill(state, segment, "answer")
    state.crop_to(mark)
    state.horizon -= 1
    with pytest.raises(HorizonError, match=f"position {segment.next_position}"):
        stepper.prefill(state, segment, "answer")
    assert state.mark() == mark


@EVERY_FAMILY
def test_a_pinned_prefix_that_fills_the_budget_is_refused_before_anything_enters(family: str) -> None:
    stepper = shared_engine(family).stepper
    with pytest.raises(ConfigError, match="pinned prefix"):
        fed(stepper, budget=3, pin_prefix=True)
    assert fed(stepper, budget=3, pin_prefix=True, carry="all").frames == 4


@EVERY_FAMILY
def test_modes_differ_in_what_they_see_and_leave(family: str) -> None:
    stepper = shared_engine(family).stepper
    state = fed(stepper, budget=8)
    mark = state.mark()
    with torch.inference_mode():
        segment = entering(stepper.model, some_frames(2, seed=4)[: stepper.model.frames_per_step], state)[0]
    found = {}
    for mode in ("peek", "answer"):
        found[mode] = stepper.prefill(state, segment, mode)  # type: ignore[arg-type]
        state.crop_to(mark)
        assert state.mark() == mark
    found["carry"] = stepper.prefill(state, segment)
    assert torch.allclose(found["peek"], found["carry"], atol=1e-5)
    assert not torch.allclose(found["answer"], found["carry"], atol=1e-2)
    assert state.carried.length == 8


@EVERY_FAMILY
def test_an_answer_yields_each_token_with_its_logits_and_the_end_token_last(family: str) -> None:
    stepper = shared_engine(family).stepper
    state = fed(stepper)
    mark = state.mark()
    question = stepper.model.question(QUESTION, state)
    found = list(stepper.answer(state, question, Sampling(8)))
    assert len(found) == 8
    assert all(int(logits.argmax()) == token for token, logits in found)
    assert found[0][1].shape == (1, stepper.model.text_config.vocab_size)
    # The last token was chosen, but has not entered.
    assert state.tokens == mark.tokens + question.length + 7
    state.crop_to(mark)
    tokens = [token for token, _ in found]
    ended = [token for token, _ in stepper.answer(state, question, Sampling(8, frozenset([tokens[4]])))]
    assert ended == tokens[: tokens.index(tokens[4]) + 1]
    state.crop_to(mark)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"),
    ],
    ids=["cuda", "python", "cpu", "mps"],
)
def test_the_many_ways_of_running_out_of_memory(error: BaseException) -> None:
    with pytest.raises(MemoryLimitError, match="out of memory") as told, memory_limit():
        raise error
    assert "budget" in told.value.hint
    assert told.value.__cause__ is error


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ValueError("x"), KeyboardInterrupt()])
def test_other_errors_are_left_alone(error: BaseException) -> None:
    with pytest.raises(type(error)) as told, memory_limit():
        raise error
    assert told.value is error
