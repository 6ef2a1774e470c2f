"""Replayed steps equal plain ones; CUDA itself is tried where there is one."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from statekv.cache.batched import StaticCarriedCache
from statekv.cache.stream import StreamState
from statekv.config import Config
from statekv.engine.session import Session
from statekv.errors import SpeedWarning
from statekv.runner.cuda_graph import StepGraphs
from statekv.runner.runner import ModelRunner
from tests.gpu import need_gpu
from tests.presets import filled
from tests.talk import assert_same_stream, frames_of, session_answer, shared_engine, some_frames
from tests.tiny import TWO_FAMILIES, video

EVERY_FAMILY = pytest.mark.parametrize("family", TWO_FAMILIES)
Call = Callable[[], torch.Tensor]


@dataclass
class Tape:
    """Stands for a device's recorder: the commands are the call itself, run at each replay, in the same places."""

    recorded: int = 0
    replayed: int = 0
    error: Exception | None = None
    graphs: StepGraphs = field(init=False)

    def __post_init__(self) -> None:
        self.graphs = StepGraphs(self.record, "cpu")

    def record(self, call: Call) -> Call:
        if self.error is not None:
            raise self.error
        self.recorded += 1
        recorded = places(call)

        def replay() -> torch.Tensor:
            assert places(call) == recorded, "a recording writes to where nothing lies any more"
            self.replayed += 1
            return call()

        return replay


def places(call: Call) -> list[tuple[int, tuple[int, ...]]]:
    """Where everything lies that the commands of a step read and write, and with which strides."""
    found = (cell.cell_contents for cell in call.__closure__ or ())  # type: ignore[attr-defined]
    (carried,) = (each.carried for each in found if isinstance(each, StaticCarriedCache))
    state = [tensor for layer in carried.state for tensor in layer.values()]
    tensors = *carried.buffers, *carried.token_ids, *state, *carried.newest.values(), *carried.detailed.buffers
    return [(tensor.data_ptr(), tensor.stride()[:1]) for tensor in tensors]


def session(family: str, tape: Tape | None, **settings: Any) -> Session:
    """A session on the shared tiny model; without a tape as on any CPU."""
    runner = ModelRunner(shared_engine(family).model, tape.graphs if tape is not None else None)
    return Session(runner, runner.open(Config(**filled(settings, budget=20))))


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("internvl", {}),
        ("internvl", {"pin_prefix": True}),
        ("internvl", {"carry": "recent"}),
        ("internvl", {"carry": "sink_recent"}),
        ("internvl", {"carry": "random"}),
        ("internvl", {"recall": "recent"}),
        ("internvl", {"layout": "release"}),
        ("internvl", {"budget": 3}),
        ("qwen3_vl", {}),
        ("qwen3_vl", {"layout": "release"}),
    ],
    ids=str,
)
def test_replayed_steps_equal_plain_ones(family: str, settings: dict[str, Any]) -> None:
    tape = Tape()
    mine, other = session(family, tape, **settings), session(family, None, **settings)
    for part in (slice(0, 6), slice(6, 18)):
        for each in (mine, other):
            each.push(some_frames(18)[part])
        assert_same_stream(mine, other)
        assert torch.equal(session_answer(mine).logits, session_answer(other).logits)
    assert tape.replayed > tape.recorded > 0


@EVERY_FAMILY
def test_replays_go_on_when_positions_are_compacted(family: str) -> None:
    """Keys are rotated in place, and positions are inputs of a recorded step."""
    tape = Tape()
    mine, other = session(family, tape, horizon=160), session(family, None, horizon=160)
    for each in (mine, other):
        each.state.compacts = True
        each.state.detailed.reserve(1000)
        each.push(frames_of(video(40), fps=2.0))
    assert mine.state.compaction.factor > 1
    assert_same_stream(mine, other)
    assert tape.replayed > 2 * tape.recorded > 0


@EVERY_FAMILY
def test_a_shape_is_recorded_when_it_comes_again(family: str) -> None:
    tape = Tape()
    watched = session(family, tape)
    watched.state.detailed.reserve(1000)
    per_step = watched.runner.model.frames_per_step
    frames = some_frames(9 * per_step)  # labels of one digit: steps of one length
    lengths: list[int] = []
    for start in range(0, len(frames), per_step):
        was_full = watched.state.tokens > 0 and watched.state.carried.length == 20
        watched.push(frames[start : start + per_step])
        lengths += [watched.state.spans[-1].length] * was_full
    again = len(lengths) - len(set(lengths))
    assert tape.replayed == again
    assert tape.recorded == len({length for length in lengths if lengths.count(length) > 1})


def test_a_growing_cache_is_recorded_anew() -> None:
    tape = Tape()
    watched, other = session("internvl", tape), session("internvl", None)
    for each in (watched, other):
        each.push(some_frames(60))
    assert watched.state.detailed.grown > 0
    assert_same_stream(watched, other)


def test_a_step_longer_than_any_before_is_recorded_anew() -> None:
    """Frame10 has a longer label than Frame9: the slots move, and old recordings with them."""
    tape = Tape()
    watched, other = session("internvl", tape), session("internvl", None)
    for each in (watched, other):
        each.push(some_frames(14))
    assert len({span.length for span in watched.state.spans if span.kind == "step"}) > 1
    assert_same_stream(watched, other)


def test_two_streams_have_recordings_of_their_own() -> None:
    tape = Tape()
    one = session("internvl", tape)
    two = Session(one.runner, one.runner.open(Config(budget=20)))
    others = [session("internvl", None) for _ in range(2)]
    for i in range(12):
        for each, seed in ((one, 0), (two, 1), (others[0], 0), (others[1], 1)):
            each.push(some_frames(12, seed)[i : i + 1])
    assert_same_stream(one, others[0])
    assert_same_stream(two, others[1])


def test_graph_false_records_nothing() -> None:
    tape = Tape()
    watched = session("internvl", tape, graph=False)
    watched.push(some_frames(9))
    assert (tape.recorded, tape.replayed) == (0, 0)


def test_a_cpu_records_nothing_of_its_own_accord() -> None:
    watched = session("internvl", None)
    watched.push(some_frames(6))
    assert not watched.runner.graphs._streams


def test_where_recording_fails_steps_go_on_and_say_so_once() -> None:
    tape = Tape(error=RuntimeError("operation not permitted when stream is capturing\nand more"))
    watched, other = session("internvl", tape), session("internvl", None)
    with pytest.warns(SpeedWarning, match=r"operation not permitted .*graph=False") as told:
        watched.push(some_frames(9))
    other.push(some_frames(9))
    assert len([warning for warning in told if warning.category is SpeedWarning]) == 1
    assert_same_stream(watched, other)


def test_recordings_die_with_their_stream() -> None:
    tape = Tape()
    watched = session("internvl", tape)
    watched.push(some_frames(9))
    assert len(tape.graphs._streams) == 1
    watched.close()
    gc.collect()
    assert not tape.graphs._streams


def test_a_failed_replay_breaks_the_session_as_a_failed_step_does() -> None:
    tape = Tape()
    watched = session("internvl", tape)
    watched.push(some_frames(7))
    before = session_answer(watched)
    with failing(watched.runner), pytest.raises(ZeroDivisionError):
        watched.push(some_frames(1, seed=5))
    assert torch.equal(session_answer(watched).logits, before.logits)


@contextmanager
def failing(runner: ModelRunner) -> Iterator[None]:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    hook = runner.model.language_model.layers[1].mlp.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.gpu
@EVERY_FAMILY
def test_cuda_graphs_equal_plain_steps(family: str) -> None:
    """Not run without a GPU."""
    need_gpu()
    model = shared_engine(family).model
    model.model.cuda()
    try:
        states: list[StreamState] = []
        with warnings.catch_warnings():
            warnings.simplefilter("error", SpeedWarning)
            for graph in (True, False):
                runner = ModelRunner(model)
                watched = Session(runner, runner.open(Config(budget=20, graph=graph)))
                watched.push(some_frames(18))
                states.append(watched.state)
        mine, other = states
        for layer in range(mine.spec.layers):
            torch.testing.assert_close(mine.detailed.keys(layer), other.detailed.keys(layer), atol=1e-4, rtol=1e-4)
            assert torch.equal(mine.carried.kept(layer), other.carried.kept(layer))  # type: ignore[union-attr]
    finally:
        model.model.cpu()
