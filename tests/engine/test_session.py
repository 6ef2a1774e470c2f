"""One stream: watching, asking, and everything that can go wrong on the way."""

from __future__ import annotations

import copy
import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from statekv.cache.carried import CarriedCache
from statekv.cache.detailed import DetailedCache
from statekv.config import Config
from statekv.engine.engine import Engine
from statekv.engine.progress import Progress
from statekv.engine.session import Session
from statekv.errors import ConfigError, HorizonError, StateKVError
from statekv.runner.decoding import SamplingParams
from statekv.video.frame import Frame
from statekv.video.writer import write_video
from tests.talk import (
    QUESTION,
    UNLIMITED,
    adapted,
    assert_same_stream,
    decoded,
    inputs_of,
    session_answer,
    shared_engine,
    some_frames,
    stock_answer,
    stock_ids,
)
from tests.tiny import TWO_FAMILIES, tiny, video

# What checkpoints ship in their generation_config.json.
THEIRS: list[dict[str, Any]] = [
    {"repetition_penalty": 0.3},
    {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05},
]
EVERY_FAMILY = pytest.mark.parametrize("family", TWO_FAMILIES)


def watching(family: str, frames: int, budget: int = 20) -> Session:
    session = shared_engine(family).open(budget=budget)
    session.source = iter(some_frames(frames))
    return session


@EVERY_FAMILY
def test_progress_is_told_after_each_step(family: str) -> None:
    session = watching(family, 6)
    told: list[Progress] = []
    session.watch(on_step=told.append)
    per_step = session.runner.model.frames_per_step
    assert [progress.step for progress in told] == list(range(1, 6 // per_step + 1))
    assert [progress.frames for progress in told] == list(range(per_step, 7, per_step))
    assert [progress.pts_seconds for progress in told] == [frames - 1.0 for frames in range(per_step, 7, per_step)]
    assert [progress.tokens for progress in told] == sorted({progress.tokens for progress in told})
    assert told[-1].tokens == session.state.tokens == sum(span.length for span in session.state.spans)
    assert told[-1].carried == 20
    assert all(progress.step_seconds > 0 for progress in told)
    assert session.seconds.vision > 0 < session.seconds.prefill


@EVERY_FAMILY
def test_watching_in_two_goes_equals_one(family: str) -> None:
    one, two = watching(family, 7), watching(family, 7)
    one.watch()
    two.watch(until_seconds=2.5)
    assert two.frames == 4
    two.watch(until_seconds=2.5)
    assert two.frames == 5
    two.watch()
    assert two.frames == 7
    two.watch()
    assert_same_stream(two, one)


@EVERY_FAMILY
def test_pushing_at_once_equals_pushing_one_by_one(family: str) -> None:
    at_once, one_by_one = shared_engine(family).open(budget=20), shared_engine(family).open(budget=20)
    at_once.push(iter(some_frames(7)))
    for frame in some_frames(7):
        one_by_one.push([frame])
    at_once.push([])
    assert_same_stream(at_once, one_by_one)


def test_nothing_that_runs_is_copied_or_pickled() -> None:
    session = shared_engine("internvl").open()
    for thing in (shared_engine("internvl"), session, session.state):
        for way in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(StateKVError, match=f"{type(thing).__name__} cannot be copied or pickled"):
                way(thing)


@EVERY_FAMILY
def test_a_session_without_a_source_says_so(family: str) -> None:
    with pytest.raises(ConfigError, match="push frames"):
        shared_engine(family).open().watch()


@EVERY_FAMILY
def test_nothing_seen_cannot_be_asked_about(family: str) -> None:
    session = shared_engine(family).open()
    for ask in (session.ask, session.logits, lambda question: list(session.stream(question))):
        with pytest.raises(ConfigError, match="nothing has been seen"):
            ask(QUESTION)
    session.push(some_frames(1))
    assert session.ask(QUESTION)


@pytest.mark.parametrize(
    ("family", "question"),
    [
        *((family, question) for family in TWO_FAMILIES for question in ("", "  \n")),
        ("internvl", "What is <img>?"),
        ("qwen3_vl", "What is <|video_pad|>?"),
        ("qwen2_5_vl", "What is <|vision_end|>?"),
        ("llava_onevision", "What is <video>?"),
    ],
)
def test_a_question_that_cannot_be_asked_loses_nothing(family: str, question: str) -> None:
    session, other = shared_engine(family).open(budget=20), shared_engine(family).open(budget=20)
    for stream in (session, other):
        stream.push(some_frames(5))
    for ask in (session.ask, session.logits):
        with pytest.raises(ConfigError):
            ask(question)
    assert_same_stream(session, other)
    assert session.ask(QUESTION) == other.ask(QUESTION)


@EVERY_FAMILY
def test_what_was_seen_up_to_the_horizon_can_be_asked(family: str) -> None:
    session = shared_engine(family).open(horizon=150, on_horizon="error", max_new_tokens=6, budget=20)
    with pytest.raises(HorizonError, match="150"):
        session.push(some_frames(100))
    seen = session.frames
    assert seen > 4
    state = session.state
    assert state.position <= 150
    assert seen == state.frames + session.runner.model.frames_per_step - 1  # a partner waits as before
    first = session.ask(QUESTION)
    with pytest.raises(HorizonError):
        session.push(some_frames(2))
    assert session.frames == seen
    assert session.ask(QUESTION) == first


@EVERY_FAMILY
def test_an_answer_ends_at_the_horizon_and_leaves_no_trace(family: str) -> None:
    session, other = (shared_engine(family).open(horizon=160, budget=20) for _ in range(2))
    for stream in (session, other):
        stream.push(some_frames(4))
    question = session.runner.model.question(QUESTION, session.state)
    sampling = SamplingParams(max_new_tokens=500)
    mark = session.state.mark()
    tokens = [token for token, _ in decoded(session.runner, session.state, question, sampling)]
    # The last token is chosen at the horizon, but has no position of its own.
    assert len(tokens) == 160 - question.next_position + 1
    session.state.crop_to(mark)
    assert_same_stream(session, other)


@EVERY_FAMILY
def test_stop_strings_end_the_answer_in_front_of_them(family: str) -> None:
    session = shared_engine(family).open(max_new_tokens=24)
    session.push(some_frames(4))
    whole = session.ask(QUESTION)
    stop = whole[5:8]
    assert session.ask(QUESTION, stop=(stop, "never said")) == whole[: whole.index(stop)]
    assert "".join(session.stream(QUESTION, stop=(stop,))) == whole[: whole.index(stop)]
    assert session.ask(QUESTION, stop=("never said",)) == whole
    assert session.ask(QUESTION, stop=stop) == whole[: whole.index(stop)]
    assert session.ask(QUESTION, stop_strings=[stop]) == whole[: whole.index(stop)]


@EVERY_FAMILY
def test_the_longest_answer_is_the_questions_or_the_settings(family: str) -> None:
    session = shared_engine(family).open(max_new_tokens=9)
    session.push(some_frames(4))
    assert len(session_answer(session, max_new_tokens=3).tokens) == 3
    decode = session.runner.model.tokenizer.decode
    longest = session_answer(session, max_new_tokens=9).tokens
    assert session.ask(QUESTION) == decode(longest, skip_special_tokens=True)
    with pytest.raises(ConfigError, match="max_new_tokens is 0"):
        session.ask(QUESTION, max_new_tokens=0)


@EVERY_FAMILY
def test_an_end_token_ends_the_answer_and_is_not_said(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    session = shared_engine(family).open(max_new_tokens=9)
    session.push(some_frames(4))
    tokens = session_answer(session, max_new_tokens=9).tokens
    monkeypatch.setattr(session.runner.model.model.generation_config, "eos_token_id", [tokens[2]])
    end = tokens.index(tokens[2])
    assert session.ask(QUESTION) == session.runner.model.tokenizer.decode(tokens[:end], skip_special_tokens=True)


@EVERY_FAMILY
def test_sampled_answers_follow_the_seed(family: str) -> None:
    session = shared_engine(family).open(max_new_tokens=12)
    session.push(some_frames(4))

    def answers(seed: int | None) -> list[str]:
        return [session.ask(QUESTION, do_sample=True, temperature=3.0, seed=seed) for _ in range(2)]

    first, other = answers(1), answers(2)
    assert first == answers(1)
    assert first[0] == first[1] != other[0]
    fresh = answers(None)
    assert fresh[0] != fresh[1]
    assert session.ask(QUESTION, do_sample=True, top_k=1) == session.ask(QUESTION)


@pytest.mark.parametrize("theirs", THEIRS, ids=lambda theirs: "-".join(theirs))
@pytest.mark.parametrize("family", ["internvl", "qwen2_5_vl", "eagle2_5"])
def test_a_session_answers_as_stock_by_the_checkpoints_own_settings(family: str, theirs: dict[str, Any]) -> None:
    made = tiny(family)
    engine = Engine(adapted(made), Config(max_new_tokens=12))
    engine.runner.model.generator.generation_config.update(**theirs)
    torch.manual_seed(4)
    expected = stock_ids(made, inputs_of(made, video(4), QUESTION), max_new_tokens=12)[0, -12:]
    session = engine.open(**UNLIMITED)
    session.push(some_frames(4))
    for other in (session, session.fork()):
        torch.manual_seed(4)
        assert session_answer(other, max_new_tokens=12).tokens == expected.tolist()
    greedy = session.ask(QUESTION, do_sample=False, repetition_penalty=1.0)
    assert greedy != session.runner.model.tokenizer.decode(expected, skip_special_tokens=True)


def test_penalties_know_of_frames_that_wait_and_of_those_before_a_restore(tmp_path: Path) -> None:
    made = tiny("qwen2_5_vl")
    engine = Engine(adapted(made), Config(max_new_tokens=12))
    engine.runner.model.generator.generation_config.update(repetition_penalty=0.3)
    expected = stock_answer(made, inputs_of(made, video(5), QUESTION), max_new_tokens=12).tokens
    session = engine.open(**UNLIMITED)
    session.push(some_frames(5))
    assert session_answer(session, max_new_tokens=12).tokens == expected
    session.save(tmp_path / "saved")
    assert session_answer(engine.restore(tmp_path / "saved"), max_new_tokens=12).tokens == expected


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"do_sample": True, "temperature": -1.0}, "temperature"),
        ({"temperature": 0.5}, "temperature is 0.5, but means something only where tokens are drawn"),
        ({"top_k": 3, "do_sample": False}, "top_k is 3"),
        ({"tempreature": 0.5}, "tempreature"),
        ({"max_length": 30}, "max_new_tokens"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size"),
        ({"num_beams": 4}, "num_beams"),
        ({"stop": 3}, "stop is 3"),
        ({"stop": [3]}, "stop"),
        ({"seed": "a"}, "seed is 'a'"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
    ],
    ids=str,
)
def test_parameters_that_cannot_be_followed_are_refused_at_once(wrong: dict[str, Any], told: str) -> None:
    session = shared_engine("internvl").open()
    session.push(some_frames(2))
    with pytest.raises(ConfigError, match=re.escape(told)) as caught:
        session.stream(QUESTION, **wrong)
    assert "\n" not in str(caught.value)


@EVERY_FAMILY
def test_closing_frees_and_ends_the_session(family: str) -> None:
    closed: list[str] = []

    def source() -> Iterator[Frame]:
        try:
            yield from some_frames(9)
        finally:
            closed.append("source")

    with shared_engine(family).open(budget=20) as session:
        session.source = source()
        session.watch(until_seconds=3)
        assert session.state.nbytes["detailed"] > 0
    assert closed == ["source"]
    session.close()
    assert session.state.nbytes["detailed"] == 0
    for use in (
        lambda: session.ask(QUESTION),
        lambda: session.logits(QUESTION),
        lambda: list(session.stream(QUESTION)),
        lambda: session.push(some_frames(1)),
        session.watch,
    ):
        with pytest.raises(StateKVError, match="closed"):
            use()


@EVERY_FAMILY
def test_closing_in_the_middle_of_an_answer_is_harmless(family: str) -> None:
    engine = shared_engine(family)
    session, other = engine.open(budget=20), engine.open(budget=20)
    for stream in (session, other):
        stream.push(some_frames(4))
    expected = other.ask(QUESTION)
    answer = session.stream(QUESTION)
    next(answer)
    session.close()
    del answer
    assert other.ask(QUESTION) == expected


@EVERY_FAMILY
def test_memory_is_flat(family: str) -> None:
    """The carried cache never holds more than the budget; after `reserve` the detailed one never moves."""
    session = shared_engine(family).open(budget=20)
    detailed = session.state.detailed
    detailed.reserve(600)
    addresses = [buffer.data_ptr() for buffer in detailed.buffers]
    carried: list[list[int]] = []
    for frame in some_frames(40):
        session.push([frame])
        session.ask(QUESTION, max_new_tokens=2)
        held = session.state.carried
        assert isinstance(held, CarriedCache)
        assert all(length <= 20 for length in held.lengths)
        carried.append([buffer.data_ptr() for buffer in held.buffers])
    assert [buffer.data_ptr() for buffer in detailed.buffers] == addresses
    assert detailed.grown == 0
    assert all(addresses == carried[10] for addresses in carried[10:])


@EVERY_FAMILY
@pytest.mark.parametrize("fits", [True, False])
def test_a_video_of_known_length_gets_its_memory_at_once(
    family: str, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 900 GiB")

    if not fits:
        monkeypatch.setattr(DetailedCache, "reserve", refuse)
    write_video(tmp_path / "clip.mp4", video(60), fps=1)
    with shared_engine(family).open(tmp_path / "clip.mp4", budget=20) as session:
        session.watch()
        state = session.state
        assert session.frames == 60
        assert state.tokens > 200
        assert session.ask(QUESTION)
        assert not fits or state.detailed.grown == state.spec.layers


@EVERY_FAMILY
def test_without_reserve_the_detailed_cache_moves_seldom(family: str) -> None:
    session = shared_engine(family).open(budget=20)
    session.push(some_frames(60))
    spec = session.state.spec
    assert session.state.tokens > 200
    assert session.state.detailed.grown <= 2 * spec.layers
    assert session.state.nbytes["detailed"] == session.state.detailed.capacity * spec.bytes_per_token


def test_settings_of_a_session_are_its_engines_unless_said_otherwise() -> None:
    session = shared_engine("internvl").open(method="streaming_llm", budget=33)
    assert session.state.config == Config.of("streaming_llm", budget=33, max_new_tokens=6)


def test_stats_tell_what_a_session_is_holds_and_has_cost() -> None:
    session = shared_engine("internvl").open(budget=20, carry="recent")
    empty = session.stats()
    session.push(some_frames(3))
    session.ask(QUESTION)
    found = session.stats()
    assert empty.keys() == found.keys()
    assert (empty["frames"], empty["tokens"], found["frames"], found["steps"]) == (0, 0, 3, 3)
    assert (found["method"], found["carry"], found["carried"]) == (session.state.config.method, "recent", 20)
    assert (found["tokens"], found["positions"]) == (session.state.tokens, session.state.position)
    assert found["graph"] is False  # a CPU records nothing
    assert found["kernel"] in ("blocked", "naive")
    assert found["bytes_used"]["detailed"] <= found["bytes"]["detailed"]
    assert min(found["seconds"]["prefill"], found["seconds"]["answer"]) > 0
    assert json.loads(json.dumps(found)) == found
