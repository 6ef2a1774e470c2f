"""Sessions within a cap on memory: what is still held answers as if there were no cap, wherever it lies."""

from __future__ import annotations

import functools
import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from statekv.cache.carry import policy_of
from statekv.cache.detailed import DetailedCache
from statekv.cache.stream import room_for_answers
from statekv.cache.tiers.cache import TieredCache
from statekv.cache.tiers.plan import plan
from statekv.config import BYTES, SETTINGS, Config
from statekv.engine.session import Session
from statekv.errors import ConfigError, MemoryLimitError, StateKVError, StorageError
from statekv.ops.quantise import dequantise, quantise
from tests.presets import chosen, filled, preset
from tests.runner.test_cuda_graph import Tape
from tests.runner.test_cuda_graph import session as recorded_session
from tests.runner.test_runner import push_together
from tests.talk import (
    QUESTION,
    assert_same_answer,
    assert_same_memory,
    assert_same_stream,
    frames_of,
    session_answer,
    shared_engine,
)
from tests.tiny import video

TWO_FAMILIES = pytest.mark.parametrize("family", ["internvl", "qwen2_5_vl"])
FRAMES = 26
LOWER: dict[str, dict[str, Any]] = {
    "host": {"host_memory": "1GiB"},
    "disk": {"disk": "1GiB"},
    "host and disk": {"host_memory": "40KiB", "disk": "1GiB"},
}
# Each with one frame to a step; with two, and positions of three axes, where a block passes through all tiers.
EVERY_LOWER = pytest.mark.parametrize(
    ("family", "lower"),
    [*(("internvl", lower) for lower in LOWER.values()), ("qwen2_5_vl", LOWER["host and disk"])],
    ids=str,
)
CARRY = {
    **chosen("attention", "random"),
    "pinned": preset("pinned", pin_newest=1),
    "decay": preset("decay", value_norms=True),
    "retrieve": preset("retrieve", retrieve=3, retrieve_carried=True),
}
BOTH_RECALLS = [CARRY[name] for name in ("attention", "retrieve")]


def opened(family: str, **settings: Any) -> Session:
    return shared_engine(family).open(**filled(settings, budget=40, max_new_tokens=6))


@functools.cache
def pictures(frames: int = FRAMES) -> tuple[Any, ...]:
    return tuple(frames_of(video(frames, seed=5)))


def watched(family: str, **settings: Any) -> Session:
    session = opened(family, **settings)
    session.push(pictures())
    return session


def uncapped(family: str, **settings: Any) -> Session:
    """As `watched`, computed once: a fork, on which nobody leaves a trace for the next."""
    return _watched_once(family, tuple(settings.items())).fork()


@functools.cache
def _watched_once(family: str, settings: tuple[tuple[str, Any], ...]) -> Session:
    return watched(family, **dict(settings))


def tight(family: str, steps: int = 0, **settings: Any) -> dict[str, Any]:
    """These settings with little more memory than will do, and room for some steps more."""
    return {**settings, "memory": _tight_memory(family, steps, tuple(settings.items()))}


@functools.cache
def _tight_memory(family: str, steps: int, given: tuple[tuple[str, Any], ...]) -> int:
    settings = dict(given)
    probe = opened(family, **{key: value for key, value in settings.items() if key in ("recall", "method")})
    probe.push(pictures()[:2])
    longest = max(span.length for span in probe.state.spans if span.kind == "step") + 4
    texts = sum(span.length for span in probe.state.spans if span.kind != "step")
    spec, least = probe.state.spec, 1 << 14
    while True:
        config = Config.of(**{"budget": 40, "max_new_tokens": 6, **settings, "memory": least})
        try:
            plan(config, spec, policy_of(config), texts, longest, room_for_answers(config))
        except ConfigError:
            least += 1 << 12
            continue
        return int(least + (1 + steps) * longest * spec.bytes_per_token)


def tiered(session: Session) -> TieredCache:
    found = session.state.detailed
    assert isinstance(found, TieredCache)
    return found


def held(session: Session) -> list[torch.Tensor]:
    """Keys and values of every step that is held, and of all text, in order, wherever they lie."""
    cache = tiered(session)
    cache.fetcher.turned = functools.partial(session.runner.model.moved, horizon=session.state.horizon)
    starts = list(cache.entries)
    stops = [entry.start + entry.length for entry in cache.entries.values()]
    return [cache.gather(layer, starts, stops) for layer in range(len(cache))]


def of(session: Session, starts: list[int], stops: list[int]) -> list[torch.Tensor]:
    detailed = session.state.detailed
    return [detailed.gather(layer, starts, stops) for layer in range(len(detailed))]


def carried(session: Session) -> list[torch.Tensor]:
    cache: Any = session.state.carried
    return [cache.kept(layer) for layer in range(len(cache))]


def spots(session: Session) -> tuple[list[int], list[int]]:
    entries = tiered(session).entries.values()
    return [each.start for each in entries], [each.start + each.length for each in entries]


@pytest.mark.parametrize(
    ("family", "carry"),
    [*(("internvl", carry) for carry in CARRY.values()), *(("qwen2_5_vl", carry) for carry in BOTH_RECALLS)],
    ids=str,
)
def test_a_cap_that_is_not_reached_changes_nothing(family: str, carry: dict[str, Any]) -> None:
    capped, free = watched(family, memory="1GiB", **carry), uncapped(family, **carry)
    assert_same_stream(capped, free)
    assert torch.equal(capped.logits(QUESTION), free.logits(QUESTION))
    assert not capped.state.forgotten


@pytest.mark.parametrize(
    ("family", "carry", "lower"),
    [
        *(("internvl", carry, LOWER["host and disk"]) for carry in CARRY.values()),
        *(("internvl", CARRY["retrieve"], LOWER[name]) for name in ("host", "disk")),
        *(("qwen2_5_vl", carry, LOWER["host and disk"]) for carry in BOTH_RECALLS),
    ],
    ids=str,
)
def test_lower_tiers_hold_every_bit_and_answer_the_same(
    family: str, carry: dict[str, Any], lower: dict[str, Any]
) -> None:
    capped, free = watched(family, **tight(family, **carry, **lower)), uncapped(family, **carry)
    assert {tier for tier, *_ in tiered(capped).manager.blocks()} == {"host", "disk"} & {
        name.removesuffix("_memory") for name in lower
    }
    assert not capped.state.forgotten
    assert_same_memory(carried(capped), carried(free))
    assert_same_memory(held(capped), of(free, *spots(capped)))
    if carry.get("recall") == "retrieve":
        assert torch.equal(capped.logits(QUESTION), free.logits(QUESTION))
    assert_same_answer(session_answer(capped), session_answer(free))


@EVERY_LOWER
def test_questions_change_nothing(family: str, lower: dict[str, Any]) -> None:
    settings = tight(family, recall="retrieve", retrieve=4, **lower)
    asked, silent = opened(family, **settings), opened(family, **settings)
    for number, frame in enumerate(pictures()):
        for each in (asked, silent):
            each.push([frame])
        if number % 7 == 6:
            assert asked.ask(QUESTION) == asked.ask(QUESTION)
    assert_same_memory(held(asked), held(silent))
    assert_same_memory(carried(asked), carried(silent))
    assert asked.state.spans == silent.state.spans
    assert {**asked.state.nbytes, "recent": 0} == {**silent.state.nbytes, "recent": 0}


@EVERY_LOWER
def test_where_no_step_is_left_out_retrieval_is_full_recall_to_the_bit(family: str, lower: dict[str, Any]) -> None:
    session = watched(family, **tight(family, recall="retrieve", retrieve=FRAMES, **lower))
    assert len(tiered(session).manager)
    everything = session.fork()
    everything.state.blocks = None
    assert torch.equal(session.logits(QUESTION), everything.logits(QUESTION))
    assert_same_answer(session_answer(session), session_answer(uncapped(family)))


@TWO_FAMILIES
def test_steps_asked_for_lately_are_not_read_again(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    capped = watched(family, **tight(family, recall="retrieve", retrieve=2, disk="1GiB"))
    fetcher = tiered(capped).fetcher
    expected = capped.logits(QUESTION)
    monkeypatch.setattr(fetcher, "bring", lambda layer, steps: pytest.fail("read again"))
    assert torch.equal(capped.logits(QUESTION), expected)
    assert len(fetcher.recent)


@pytest.mark.parametrize(("family", "bits"), [*(("internvl", bits) for bits in (8, 4, 2)), ("qwen2_5_vl", 4)])
def test_quantised_steps_are_what_quantising_makes_of_them_once(family: str, bits: int) -> None:
    capped, free = watched(family, **tight(family, bits=bits, host_memory="20KiB", disk="1GiB")), uncapped(family)
    starts, stops = spots(capped)
    entries = list(tiered(capped).entries.values())
    assert len(tiered(capped).manager)
    assert not capped.state.forgotten
    assert_same_memory(carried(capped), carried(free))
    for found, plain in zip(held(capped), of(free, starts, stops), strict=True):
        lengths = [entry.length for entry in entries]
        for entry, here, there in zip(entries, found.split(lengths, -2), plain.split(lengths, -2), strict=True):
            if entry.block is None:
                assert torch.equal(here, there)
                continue
            once = quantise(there.permute(3, 0, 1, 2, 4), bits)
            expected = dequantise(once, 0, entry.length, there.dtype).permute(1, 2, 3, 0, 4)
            assert torch.equal(here, expected)
            assert (here - there).abs().max() <= once.scale.float().max() / 2 * 1.01


def test_eight_bits_are_nearer_than_four_and_these_than_two() -> None:
    expected, far = uncapped("internvl").logits(QUESTION), []
    for bits in (8, 4, 2):
        session = watched("internvl", **tight("internvl", bits=bits, host_memory="1GiB"))
        far.append(float((session.logits(QUESTION) - expected).abs().max()))
    assert 0 < far[0] < far[1] < far[2]


CAPS: list[dict[str, Any]] = [
    {},
    {"host_memory": "20KiB"},
    {"disk": "24KiB"},
    {"bits": 8, "host_memory": "3KiB", "disk": "4KiB"},
]
RETRIEVED = {"recall": "retrieve", "retrieve": 3}


@pytest.mark.parametrize(
    ("family", "recall", "lower"),
    [
        *(("internvl", recall, lower) for recall in ({}, RETRIEVED) for lower in CAPS),
        *(("qwen2_5_vl", {}, lower) for lower in CAPS),
        ("qwen2_5_vl", RETRIEVED, CAPS[-1]),
    ],
    ids=str,
)
def test_caps_hold_at_every_step(family: str, recall: dict[str, Any], lower: dict[str, Any]) -> None:
    session = opened(family, **tight(family, **recall, **lower))
    caps: dict[str, Any] = {
        name: getattr(session.state.config, name) or 0 for name, s in SETTINGS.items() if s.kind is BYTES
    }
    for frame in pictures():
        session.push([frame])
        taken = session.state.nbytes
        assert taken.get("host", 0) <= caps["host_memory"]
        assert taken.get("disk", 0) <= caps["disk"]
        assert sum(size for tier, size in taken.items() if tier not in ("host", "disk")) <= caps["memory"]
    cache, spans = tiered(session), session.state.spans
    assert session.state.forgotten > 0
    entered = -(-FRAMES // session.runner.model.frames_per_step)
    assert sum(entry.kind == "step" for entry in cache.entries.values()) + session.state.forgotten == entered
    assert next(span for span in spans if span.kind != "step").start == 0
    assert list(cache.entries)[-1] == spans[-1].start
    if session.state.blocks is not None:
        steps = [entry.start for entry in cache.entries.values() if entry.kind == "step"]
        assert session.state.blocks.table[:, 0].tolist() == steps


def test_a_fork_lets_go_of_forgotten_steps_as_its_stream_does() -> None:
    """Steps that are forgotten and still carried go with their last key, in each stream on its own."""
    going, alone = (watched("internvl", **tight("internvl")) for _ in range(2))
    assert (before := set(going.state.outlived))
    other = going.fork()
    for frame in frames_of(video(8, seed=6), start_seconds=FRAMES):
        for session in (alone, other):
            session.push([frame])
    assert not before <= other.state.outlived
    assert (other.state.outlived, other.state.forgotten) == (alone.state.outlived, alone.state.forgotten)
    assert other.state.spans == alone.state.spans
    assert going.state.outlived == before
    assert before <= {span.start for span in going.state.spans}


@pytest.mark.parametrize(
    ("family", "lower"), [*(("internvl", lower) for lower in CAPS[:3]), ("qwen2_5_vl", CAPS[1])], ids=str
)
def test_what_is_forgotten_was_never_there(family: str, lower: dict[str, Any]) -> None:
    """An answer equals that of an uncapped stream whose detailed cache lacks the same steps."""
    capped, free = watched(family, **tight(family, **lower)), uncapped(family)
    assert capped.state.forgotten > 0
    assert_same_memory(held(capped), of(free, *spots(capped)))
    left = DetailedCache(free.state.spec)
    for layer, tokens in enumerate(of(free, *spots(capped))):
        left.append(tokens[0], tokens[1], layer)
    left.away = free.state.tokens - left.lengths[-1]
    free.state.detailed = left
    assert_same_answer(session_answer(capped), session_answer(free))


@TWO_FAMILIES
def test_the_least_scored_go_first(family: str) -> None:
    """Whatever is forgotten ranks below all that could have been forgotten instead."""
    session = opened(family, **tight(family, 6))
    cache = tiered(session)
    for frame in pictures():
        before = dict(cache.entries)
        session.push([frame])
        gone = [entry.rank for start, entry in before.items() if start not in cache.entries]
        stayed = [entry.rank for start, entry in before.items() if start in cache.entries and entry.kind == "step"]
        assert not gone or max(gone) < min(stayed[:-2])
    assert session.state.forgotten > 0


@TWO_FAMILIES
def test_steps_in_blocks_move_with_the_stream(family: str) -> None:
    """Past the horizon: turned when they are read, from the key as it was sealed."""
    fast = frames_of(video(FRAMES, seed=5), fps=4.0 if family == "qwen2_5_vl" else 1.0)
    later = [type(frame)(frame.data, frame.pts_seconds + 400, frame.duration_seconds) for frame in fast]
    settings = {"horizon": 450, "on_horizon": "compact"}
    free = opened(family, **settings)
    free.push([*fast, *later])
    assert free.state.compaction.factor > 1
    for lower in LOWER.values():
        capped = opened(family, **tight(family, **lower), **settings)
        capped.push([*fast, *later])
        assert capped.state.compaction == free.state.compaction
        for found, expected in zip(held(capped), of(free, *spots(capped)), strict=True):
            torch.testing.assert_close(found, expected, atol=5e-5, rtol=2e-5)
        torch.testing.assert_close(capped.logits(QUESTION), free.logits(QUESTION), atol=2e-3, rtol=0)


@EVERY_LOWER
def test_forks_share_blocks_and_go_their_own_ways(family: str, lower: dict[str, Any]) -> None:
    settings = tight(family, **lower)
    going, alone = watched(family, **settings), watched(family, **settings)
    fork = going.fork()
    assert fork.ask(QUESTION) == going.ask(QUESTION) == alone.ask(QUESTION)
    for each in (going, alone):
        each.push(frames_of(video(9, seed=1), start_seconds=100))
    fork.push(frames_of(video(9, seed=2), start_seconds=100))
    assert_same_memory(held(going), held(alone))
    going.close()
    other = watched(family, **settings)
    other.push(frames_of(video(9, seed=2), start_seconds=100))
    assert_same_memory(held(fork), held(other))


@TWO_FAMILIES
def test_recorded_steps_write_to_the_same_places(family: str) -> None:
    settings = tight(family, host_memory="1GiB")
    tape = Tape()
    recorded, plain = (recorded_session(family, each, budget=40, max_new_tokens=6, **settings) for each in (tape, None))
    for each in (recorded, plain):
        each.push(pictures())
    assert tape.replayed > 5
    assert_same_memory(held(recorded), held(plain))
    assert_same_memory(carried(recorded), carried(plain))


@pytest.mark.parametrize("recall", [{}, {"recall": "retrieve", "retrieve": FRAMES}], ids=["all", "retrieve"])
@TWO_FAMILIES
def test_a_damaged_file_is_named_and_the_rest_is_usable(family: str, recall: dict[str, Any], tmp_path: Path) -> None:
    session = watched(family, **tight(family, disk="1GiB", **recall), disk_folder=str(tmp_path))
    (file,) = tmp_path.rglob("blocks")
    with file.open("r+b") as damaged:
        damaged.seek(5)
        damaged.write(b"?!")
    before = session.state.tokens
    with pytest.raises(StorageError, match=rf"{file} .*damaged steps forgotten: 1; ask again") as found:
        session.ask(QUESTION)
    assert "\n" not in str(found.value)
    assert session.state.tokens == before
    assert session.state.forgotten == 1
    assert session.ask(QUESTION) == session.ask(QUESTION)
    session.save(tmp_path / "saved")
    session.push(pictures()[:3])
    assert session.state.forgotten == 1


def test_closing_leaves_nothing(tmp_path: Path) -> None:
    gc.collect()
    open_files = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        session = watched("internvl", **tight("internvl", disk="1GiB"), disk_folder=str(tmp_path))
        assert list(tmp_path.iterdir())
        session.ask(QUESTION)
        session.close()
        del session
        gc.collect()
        assert not list(tmp_path.iterdir())
    assert len(os.listdir("/proc/self/fd")) == open_files


def test_a_question_longer_than_the_room_for_it_is_refused_and_nothing_is_lost() -> None:
    session = watched("internvl", **tight("internvl", host_memory="1GiB"))
    before = held(session)
    with pytest.raises(MemoryLimitError, match=r"do not fit into the .* that memory leaves to them") as found:
        session.ask(QUESTION, max_new_tokens=3000)
    assert "\n" not in str(found.value)
    assert_same_memory(held(session), before)
    session.push(pictures()[:3])
    session.ask(QUESTION)


def test_a_cap_too_small_for_one_step_is_refused_and_says_what_would_do() -> None:
    session = opened("internvl", memory="64KiB")
    with pytest.raises(ConfigError, match=r"memory is 64.0 KiB, but .* need about .* KiB \(raise memory") as found:
        session.push(pictures())
    assert "\n" not in str(found.value)
    assert session.state.tokens == 0


def test_a_folder_that_does_not_exist_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(StateKVError, match=r"disk_folder is .* does not exist"):
        opened("internvl", memory="1GiB", disk="1GiB", disk_folder=str(tmp_path / "none"))


@TWO_FAMILIES
def test_capped_streams_step_together(family: str) -> None:
    """Each with tiers of its own; what they hold is what they hold alone, within rounding."""
    settings = [tight(family, host_memory="1GiB"), tight(family, 3, disk="1GiB"), tight(family)]
    together, alone = ([opened(family, **each) for each in settings] for _ in range(2))
    per_step = together[0].runner.model.frames_per_step
    push_together(together, [pictures()] * 3, 0, FRAMES // per_step)
    for each in alone:
        each.push(pictures())
    for found, expected in zip(together, alone, strict=True):
        assert spots(found) == spots(expected)
        assert_same_memory(carried(found), carried(expected))
        for mine, its in zip(held(found), held(expected), strict=True):
            torch.testing.assert_close(mine, its, atol=2e-5, rtol=0)
