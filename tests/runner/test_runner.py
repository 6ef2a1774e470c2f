"""One segment at a time: what is checked before it enters, what an answer yields, which errors are memory's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from statekv.cache.carried import CarriedCache
from statekv.cache.stream import StreamState
from statekv.config import Config
from statekv.engine.engine import Engine
from statekv.engine.ingest import PendingStep
from statekv.engine.session import Session
from statekv.errors import ConfigError, HorizonError, MemoryLimitError
from statekv.runner.batching import batch_key
from statekv.runner.decoding import SamplingParams
from statekv.runner.memory import memory_limit
from statekv.runner.runner import ModelRunner
from statekv.video.frame import Frame
from tests.gpu import need_gpu
from tests.presets import chosen, filled
from tests.talk import QUESTION, assert_same_memory, decoded, entering, memory, shared_engine, some_frames
from tests.tiny import EVERY_MODEL, TWO_FAMILIES

EVERY_FAMILY = pytest.mark.parametrize("family", TWO_FAMILIES)


def fed(runner: ModelRunner, frames: int = 4, **settings: Any) -> StreamState:
    """A stream of `frames` pictures."""
    state = runner.open(Config(**filled(settings, budget=20)))
    pictures, per_step = some_frames(frames), runner.model.frames_per_step
    with torch.inference_mode():
        for start in range(0, frames, per_step):
            for segment in entering(runner.model, pictures[start : start + per_step], state):
                runner.enter(state, segment)
    return state


@EVERY_FAMILY
def test_open_takes_the_settings_horizon_then_the_files_then_the_trained_length(family: str) -> None:
    runner = shared_engine(family).runner
    assert runner.open(Config()).horizon == 4096
    assert runner.open(Config(), 9000).horizon == 9000
    assert runner.open(Config(horizon=300), 9000).horizon == 300


def test_a_video_of_known_length_takes_its_memory_once() -> None:
    runner, frames = shared_engine("internvl").runner, some_frames(60)
    grown = []
    for expected in (60, None):
        state = runner.open(Config(budget=20), frames_expected=expected)
        for frame in frames:
            for segment in entering(runner.model, [frame], state):
                runner.enter(state, segment)
            if state.frames == 1:
                runner.reserve(state)
                before = state.detailed.grown
        grown.append(state.detailed.grown - before)
    assert grown[0] == 0 < grown[1]


@EVERY_FAMILY
def test_spans_say_where_each_segment_lies(family: str) -> None:
    state = fed(shared_engine(family).runner)
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
    runner = shared_engine(family).runner
    state = fed(runner)
    segment = runner.model.question(QUESTION, state)
    state.horizon = segment.next_position
    mark = state.mark()
    runner.ask(state, segment)
    state.crop_to(mark)
    state.horizon -= 1
    with pytest.raises(HorizonError, match=f"position {segment.next_position}"):
        runner.ask(state, segment)
    assert state.mark() == mark


def test_what_the_stream_does_not_expect_does_not_enter() -> None:
    runner = shared_engine("internvl").runner
    state = fed(runner)
    mark, segment = state.mark(), runner.model.question(QUESTION, state)
    with pytest.raises(AssertionError, match="expect it first"):
        runner.prefill(state, segment)
    assert state.mark() == mark
    state.expect(segment)
    runner.prefill(state, segment)
    assert state.tokens == mark.tokens + segment.length


@EVERY_FAMILY
def test_a_pinned_prefix_that_fills_the_budget_is_refused_before_anything_enters(family: str) -> None:
    runner = shared_engine(family).runner
    with pytest.raises(ConfigError, match="pinned prefix"):
        fed(runner, budget=3, pin_prefix=True)
    assert fed(runner, carry="all").frames == 4


@EVERY_FAMILY
def test_modes_differ_in_what_they_see_and_leave(family: str) -> None:
    runner = shared_engine(family).runner
    state = fed(runner, budget=8)
    mark = state.mark()
    with torch.inference_mode():
        segment = entering(runner.model, some_frames(2, seed=4)[: runner.model.frames_per_step], state)[0]
    found = {}
    for mode in ("peek", "answer"):
        found[mode] = runner.enter(state, segment, mode)  # type: ignore[arg-type]
        state.crop_to(mark)
        assert state.mark() == mark
    found["carry"] = runner.enter(state, segment)
    assert torch.allclose(found["peek"], found["carry"], atol=1e-5)
    assert not torch.allclose(found["answer"], found["carry"], atol=1e-2)
    assert state.carried.length == 8


@EVERY_FAMILY
def test_an_answer_yields_each_token_with_its_logits_and_the_end_token_last(family: str) -> None:
    runner = shared_engine(family).runner
    state = fed(runner)
    mark = state.mark()
    question = runner.model.question(QUESTION, state)
    found = decoded(runner, state, question, SamplingParams(8))
    assert len(found) == 8
    assert all(int(logits.argmax()) == token for token, logits in found)
    assert found[0][1].shape == (1, runner.model.text_config.vocab_size)
    # The last token was chosen, but has not entered.
    assert state.tokens == mark.tokens + question.length + 7
    state.crop_to(mark)
    tokens = [token for token, _ in found]
    ended = [token for token, _ in decoded(runner, state, question, SamplingParams(8, frozenset([tokens[4]])))]
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


SETTINGS = chosen(
    *("attention", "pinned", "recent", "random", "streaming_llm", "retrieve"),
    *("decay", "newest and coverage", "more in the first layers", "sampled scores"),
    budget=20,
)
STEPS = 8
ATOL, RTOL = 2e-5, 1e-4  # float32 products of other shapes round differently


def opened(family: str, **settings: Any) -> Session:
    return shared_engine(family).open(**filled(settings, budget=20))


def films(family: str, streams: int, steps: int = STEPS) -> list[list[Frame]]:
    per_step = shared_engine(family).model.frames_per_step
    return [some_frames(steps * per_step, seed=seed) for seed in range(streams)]


def entered(sessions: Sequence[Session], films: Sequence[Sequence[Frame]], number: int) -> list[PendingStep]:
    """Step `number` of each session, looked at and placed."""
    steps = []
    for session, film in zip(sessions, films, strict=True):
        per_step = session.runner.model.frames_per_step
        for frame in film[number * per_step : (number + 1) * per_step]:
            step = session.queue.put(frame)
        assert isinstance(step, PendingStep)
        step.enter()
        steps.append(step)
    return steps


def push_together(sessions: Sequence[Session], films: Sequence[Sequence[Frame]], first: int, last: int) -> None:
    """Steps `first` … `last` - 1 as batches; each must be possible as one."""
    runner = sessions[0].runner
    states = [session.state for session in sessions]
    for number in range(first, last):
        steps = entered(sessions, films, number)
        alike = {batch_key(runner.model, step.state, step.segments) for step in steps}
        if number:
            assert len(alike) == 1
            assert None not in alike
            assert runner.gather_batch(states)
            runner.prefill_batch(states, [step.segments[0] for step in steps])
        else:
            for step in steps:
                step.prefill()
        for session, step in zip(sessions, steps, strict=True):
            session.queue.finish(step)


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


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *(("internvl", name) for name in SETTINGS),
        *(("qwen3_vl", name) for name in ("attention", "retrieve", "newest and coverage")),
    ],
)
def test_a_batch_equals_streams_alone(family: str, name: str) -> None:
    shown = films(family, 3)
    together, alone = ([opened(family, **SETTINGS[name]) for _ in shown] for _ in range(2))
    push_together(together, shown, 0, STEPS)
    for session, film in zip(alone, shown, strict=True):
        session.push(film)
    evicted = together[0].state.tokens > together[0].state.carried.length
    assert evicted
    for found, expected in zip(together, alone, strict=True):
        assert_close(found, expected)


@pytest.mark.parametrize("family", sorted(set(EVERY_MODEL) - set(TWO_FAMILIES)))
def test_a_batch_equals_streams_alone_in_every_other_model(family: str) -> None:
    shown = films(family, 2)
    together, alone = ([opened(family) for _ in shown] for _ in range(2))
    push_together(together, shown, 0, STEPS)
    for session, film, found in zip(alone, shown, together, strict=True):
        session.push(film)
        assert_close(found, session)


@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_no_stream_sees_what_another_holds(family: str) -> None:
    """To the bit: in a batch of the same size, a stream is the same whatever the others are."""
    first, second, third = films(family, 3)
    one, other = ([opened(family) for _ in range(3)] for _ in range(2))
    push_together(one, [first, second, third], 0, STEPS)
    push_together(other, [first, third, second], 0, STEPS)
    assert_same_memory(memory(one[0]), memory(other[0]))
    assert torch.equal(one[0].logits(QUESTION), other[0].logits(QUESTION))


@pytest.mark.gpu
@pytest.mark.parametrize("family", TWO_FAMILIES)
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
            for layer in range(found.state.spec.layers):
                assert isinstance(found.state.carried, CarriedCache)
                assert isinstance(expected.state.carried, CarriedCache)
                assert torch.equal(found.state.carried.kept(layer), expected.state.carried.kept(layer))
                mine, its = found.state.detailed.keys(layer), expected.state.detailed.keys(layer)
                torch.testing.assert_close(mine, its, atol=1e-4, rtol=1e-4)
    finally:
        model.cpu()
