"""A fork and its stream go their own ways from the same past, bit for bit, and share its memory while they can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from statekv.engine.session import Session
from statekv.video.writer import write_video
from tests.engine.test_snapshot import SETTINGS, assert_same_session
from tests.method.test_positions import opened, pictures
from tests.runner.test_cuda_graph import Tape
from tests.runner.test_cuda_graph import session as recorded_session
from tests.talk import (
    QUESTION,
    assert_same_memory,
    assert_same_stream,
    frames_of,
    memory,
    shared_engine,
    some_frames,
)
from tests.tiny import TWO_FAMILIES, video

EVERY_FAMILY = pytest.mark.parametrize("family", TWO_FAMILIES)


def watched(family: str, frames: int, **settings: Any) -> Session:
    session = shared_engine(family).open(**settings)
    session.push(some_frames(frames))
    return session


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *(("internvl", name) for name in SETTINGS),
        *(("qwen3_vl", name) for name in ("attention", "last_frames", "rekv")),
    ],
)
def test_both_go_on_as_if_the_other_had_never_been(family: str, name: str) -> None:
    """Frame by frame in turns, with questions in between."""
    going, alone, other = (watched(family, 7, **SETTINGS[name]) for _ in range(3))
    fork = going.fork()
    for number in range(3):
        for each, seed in ((going, 1), (fork, 2), (alone, 1), (other, 2)):
            each.push(frames_of(video(3, seed=seed), start_seconds=7)[number : number + 1])
            each.logits(QUESTION)
    assert_same_session(going, alone)
    assert_same_session(fork, other)


@EVERY_FAMILY
def test_a_question_on_a_fork_copies_nothing_and_leaves_the_stream_untouched(family: str) -> None:
    going = watched(family, 7, budget=30)
    before, places = memory(going), going.state.detailed.addresses
    fork = going.fork()
    assert fork.ask(QUESTION) == going.ask(QUESTION)
    assert fork.state.detailed.addresses == places == going.state.detailed.addresses
    assert_same_memory(memory(going), before)


@EVERY_FAMILY
def test_who_writes_second_moves_to_a_copy(family: str) -> None:
    going = watched(family, 6, budget=30)
    going.state.detailed.reserve(2000)
    fork, places = going.fork(), going.state.detailed.addresses
    fork.push(some_frames(2, seed=1))
    assert fork.state.detailed.addresses == places
    going.push(some_frames(2, seed=2))
    assert not set(going.state.detailed.addresses) & set(places)
    assert_same_stream(fork.fork(), fork)


@EVERY_FAMILY
def test_a_fork_in_the_middle_of_an_answer_of_the_other(family: str) -> None:
    going, alone = watched(family, 6, budget=30), watched(family, 6, budget=30)
    fork, expected = going.fork(), alone.ask(QUESTION)
    answer = going.stream(QUESTION)
    pieces = [next(answer)]
    fork.push(some_frames(2, seed=1))
    assert "".join([*pieces, *answer]) == expected
    assert_same_session(going, alone)
    alone.push(some_frames(2, seed=1))
    assert_same_session(fork, alone)


@EVERY_FAMILY
def test_recorded_steps_of_both(family: str) -> None:
    """A recording writes to fixed places: those of its own stream, also after that has moved."""
    tape = Tape()
    going, alone, other = recorded_session(family, tape), recorded_session(family, None), recorded_session(family, None)
    for each in (going, alone, other):
        each.push(some_frames(8))
    fork, replayed = going.fork(), tape.replayed
    for number in range(4):
        for each, seed in ((going, 1), (fork, 2), (alone, 1), (other, 2)):
            each.push(some_frames(4, seed=seed)[number : number + 1])
    assert tape.replayed > replayed
    assert_same_session(going, alone)
    assert_same_session(fork, other)


@EVERY_FAMILY
def test_a_fork_outlives_its_stream(family: str) -> None:
    going, alone = watched(family, 7, budget=30), watched(family, 7, budget=30)
    fork = going.fork().fork()
    going.close()
    for each in (fork, alone):
        each.push(some_frames(3, seed=1))
    assert_same_session(fork, alone)


@EVERY_FAMILY
def test_both_watch_the_rest_of_a_file(family: str, tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", video(20), fps=2)
    going, alone = (shared_engine(family).open(tmp_path / "clip.mp4", budget=30, vision_batch=3) for _ in range(2))
    for each in (going, alone):
        each.watch(until_seconds=4)
    fork = going.fork()
    for each in (going, fork, alone):
        each.watch()
    assert fork.frames == 10
    assert_same_session(going, alone)
    assert_same_session(fork, alone)


def test_the_users_iterator_stays_with_the_stream() -> None:
    going = shared_engine("internvl").open(budget=30)
    going.source = iter(some_frames(12))
    going.watch(until_seconds=2)
    fork = going.fork()
    fork.watch()
    going.watch()
    assert 3 < fork.frames < going.frames == 12


@EVERY_FAMILY
def test_a_fork_that_passes_its_horizon_leaves_the_stream_untouched(family: str) -> None:
    """Compaction turns keys in place, below what both hold."""
    clip = pictures(family)
    going, alone, other = (opened(family) for _ in range(3))
    for each in (going, alone, other):
        each.push(clip[:6])
    fork = going.fork()
    for each in (fork, other):
        each.push(clip[6:])
    assert fork.state.compaction.factor > 1
    assert_same_session(going, alone)
    assert_same_session(fork, other)
    for each in (going, alone):
        each.push(clip[6:])
    assert_same_session(going, alone)
