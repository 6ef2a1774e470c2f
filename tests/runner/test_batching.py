"""Which steps go together, and where their carried caches lie."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from statekv.cache.carried import CarriedCache
from statekv.engine.session import Session
from statekv.runner.batching import StepBatches, batch_key
from tests.runner.test_runner import films, opened, push_together
from tests.talk import QUESTION, UNLIMITED, assert_same_stream, entering, frames_of, some_frames
from tests.tiny import TWO_FAMILIES, video


def standing(family: str, frames: int = 6, **settings: Any) -> Session:
    session = opened(family, **settings)
    session.push(some_frames(frames))
    return session


def likeness_of_next(session: Session, seed: int = 5) -> object:
    model = session.runner.model
    step = entering(model, some_frames(model.frames_per_step, seed), session.state)
    return batch_key(model, session.state, step)


@pytest.mark.parametrize("family", TWO_FAMILIES)
@pytest.mark.parametrize(
    "settings",
    [{"max_new_tokens": 3}, {"recall": "retrieve"}, {"on_horizon": "compact"}, {"graph": False}],
    ids=str,
)
def test_sources_answers_and_detailed_caches_may_differ(family: str, settings: dict[str, Any]) -> None:
    found = likeness_of_next(standing(family))
    assert found is not None
    assert likeness_of_next(standing(family, **settings), seed=6) == found


def test_caps_may_differ_but_a_capped_stream_keeps_scores_and_others_do_not() -> None:
    found = likeness_of_next(standing("internvl", memory="1GiB"))
    assert found is not None
    assert likeness_of_next(standing("internvl", memory="2GiB", host_memory="1GiB"), seed=6) == found
    assert likeness_of_next(standing("internvl")) != found


@pytest.mark.parametrize(
    "settings",
    [{"budget": 21}, {"carry": "recent"}, {"decay": 0.1}, {"kernel": "naive"}, {"seed": 1}, {"pin_prefix": True}],
    ids=str,
)
def test_what_steps_depend_on_may_not(settings: dict[str, Any]) -> None:
    settings = {"budget": 40, **settings}
    assert likeness_of_next(standing("internvl", **settings)) != likeness_of_next(standing("internvl", budget=40))


def test_streams_with_other_pinned_prefixes_go_apart() -> None:
    one, other = (standing("internvl", budget=40, pin_prefix=True) for _ in range(2))
    assert likeness_of_next(one) == likeness_of_next(other)
    other.state.pinned += 1
    assert likeness_of_next(one) != likeness_of_next(other)


def test_another_horizon_is_another_step_only_where_rope_follows_it() -> None:
    one, other = (standing("internvl", horizon=horizon) for horizon in (5000, 6000))
    assert (likeness_of_next(one) == likeness_of_next(other)) == (one.runner.model.rope.kind != "dynamic")
    one, other = (standing("qwen3_vl", horizon=horizon) for horizon in (5000, 6000))
    assert likeness_of_next(one) == likeness_of_next(other)


def test_other_lengths_go_alone() -> None:
    """Of the carried cache, and of the step: Frame10 has a longer label."""
    assert likeness_of_next(standing("internvl", budget=200)) != likeness_of_next(standing("internvl", 7, budget=200))
    assert likeness_of_next(standing("internvl", 8)) != likeness_of_next(standing("internvl", 9))


def test_streams_that_see_everything_go_alone_and_so_does_a_first_step() -> None:
    assert likeness_of_next(standing("internvl", **UNLIMITED)) is None
    assert likeness_of_next(opened("internvl")) is None


def test_caches_that_lie_together_are_not_copied_again() -> None:
    sessions = [standing("internvl") for _ in range(3)]
    batches, states = StepBatches(), [session.state for session in sessions]
    block = batches.block(states)
    assert batches.block(states) is block
    assert batches.block(states[::-1]) is not block


def test_steps_of_a_full_batch_stay_where_they_are() -> None:
    shown = films("internvl", 3)
    sessions = [opened("internvl") for _ in shown]
    push_together(sessions, shown, 0, 4)
    places = [_place(session) for session in sessions]
    push_together(sessions, shown, 4, 8)
    assert [_place(session) for session in sessions] == places


def test_leaving_gives_the_others_memory_of_their_own() -> None:
    shown = films("internvl", 3)
    sessions, alone = ([opened("internvl") for _ in shown] for _ in range(2))
    push_together(sessions, shown, 0, 5)
    storage = weakref.ref(_carried(sessions[0]).buffers[0].untyped_storage())
    sessions.pop(1).close()
    gc.collect()
    assert storage() is None
    assert _place(sessions[0]) != _place(sessions[1])
    push_together(sessions, [shown[0], shown[2]], 5, 8)
    for session, film in ((alone[0], shown[0]), (alone[2], shown[2])):
        session.push(film)
    for found, expected in ((sessions[0], alone[0]), (sessions[1], alone[2])):
        assert found.ask(QUESTION) == expected.ask(QUESTION)


def test_a_stream_that_is_forgotten_leaves_too() -> None:
    shown = films("internvl", 2)
    sessions = [opened("internvl") for _ in shown]
    push_together(sessions, shown, 0, 3)
    states = [weakref.ref(session.state) for session in sessions]
    storage = weakref.ref(_carried(sessions[0]).buffers[0].untyped_storage())
    del sessions
    gc.collect()
    assert [state() for state in states] == [None, None]
    assert storage() is None


@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_asking_forking_and_stepping_alone_go_on_inside_a_block(family: str) -> None:
    """The block's row is a cache like any other: to the bit what the same stream is after it has moved out."""
    shown = films(family, 2, 10)
    sessions = [opened(family) for _ in shown]
    push_together(sessions, shown, 0, 6)
    fork = sessions[0].fork()
    assert fork.ask(QUESTION) == sessions[0].ask(QUESTION)
    per_step = sessions[0].runner.model.frames_per_step
    for session in (sessions[0], fork):
        session.push(shown[0][6 * per_step : 9 * per_step])
        session.push(some_frames(1, seed=9) if per_step > 1 else [])
        session.ask(QUESTION)
    assert_same_stream(sessions[0], fork)


def test_size_of_pictures_does_not_matter_where_the_steps_are_equal() -> None:
    one, other = standing("internvl"), opened("internvl")
    other.push(frames_of(video(6, height=64, width=48)))
    assert likeness_of_next(one) == likeness_of_next(other)


def test_a_block_that_has_no_room_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = [standing("internvl") for _ in range(2)]
    places = [_place(session) for session in sessions]

    def refuse(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("statekv.cache.spec.torch.empty", refuse)
    assert not sessions[0].runner.gather_batch([session.state for session in sessions])
    monkeypatch.undo()
    assert [_place(session) for session in sessions] == places


def _carried(session: Session) -> CarriedCache:
    assert isinstance(session.state.carried, CarriedCache)
    return session.state.carried


def _place(session: Session) -> int:
    return _carried(session).buffers[0].data_ptr()
