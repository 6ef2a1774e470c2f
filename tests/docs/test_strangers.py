"""A stranger reads "My policy" or "My reducer", writes one file, and it works everywhere, ours left as they are."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import statekv
from statekv.cache.stream import StreamState
from statekv.engine.session import Session
from statekv.errors import ConfigError
from statekv.evals.cards import write_film, write_story
from statekv.models.adapter import Segment
from statekv.runner.runner import ModelRunner
from tests.cli.test_cli import command
from tests.docs.pages import ROOT
from tests.docs.running import follow
from tests.runner.test_cuda_graph import Tape, session
from tests.talk import assert_same_stream, memory, some_frames

SECONDS = 16


@dataclass(frozen=True)
class Stranger:
    """What a page has the reader write.

    Attributes:
        page: in docs.
        module, name, parameters: his file, its class, and what it is used with.
        setting: that takes it.
        replays: steps of fourteen that are replayed at least, where steps are recorded.
    """

    page: str
    module: str
    name: str
    parameters: Mapping[str, Any]
    setting: str
    replays: int


STRANGERS = [
    Stranger("policy", "my_policy", "Votes", {"fade": 0.9}, "carry", 8),
    Stranger("reducer", "my_reducer", "Novel", {"share": 0.5}, "reduce", 0),
]


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many streams each batch had."""
    found: list[int] = []
    run = ModelRunner.prefill_batch

    def counted(runner: ModelRunner, states: Sequence[StreamState], segments: Sequence[Segment]) -> torch.Tensor:
        found.append(len(states))
        return run(runner, states, segments)

    monkeypatch.setattr(ModelRunner, "prefill_batch", counted)
    return found


@pytest.mark.parametrize("stranger", STRANGERS, ids=lambda stranger: stranger.module)
def test_the_page_is_followed_word_for_word(stranger: Stranger, folder: Path, batches: list[int]) -> None:
    (folder / "film.mp4").unlink()
    write_film(write_story(seed=7, duration_seconds=SECONDS), folder / "film.mp4")

    made = follow(ROOT / "docs" / f"{stranger.page}.md", folder)
    engine, settings = made["engine"], {stranger.setting: made[stranger.name](**stranger.parameters)}
    assert max(batches) >= 3

    alone = engine.open("film.mp4", **settings)
    alone.watch()
    whole = engine.open("film.mp4")
    whole.watch()
    assert not same(alone, whole)
    for each in (made["session"], made["what_if"], made["restored"], *made["several"]):
        assert each.frames == SECONDS
        assert each.ask("how many cards?") == alone.ask("how many cards?")
        assert same(each, alone)

    assert_replays_equal_steps(settings, stranger.replays)
    assert_a_save_is_refused_without_it(folder, engine, stranger)


def same(found: Session, expected: Session) -> bool:
    """The same tokens in each layer and head, and the same keys and values within the rounding of larger batches."""
    pairs = list(zip(memory(found), memory(expected), strict=True))
    if any(a.shape != b.shape for a, b in pairs):
        return False
    kept = [(a, b) for a, b in pairs if not a.is_floating_point()]
    assert kept
    rest = [(a, b) for a, b in pairs if a.is_floating_point()]
    return all(torch.equal(a, b) for a, b in kept) and all(torch.allclose(a, b, atol=1e-4) for a, b in rest)


def assert_replays_equal_steps(settings: Mapping[str, Any], replays: int) -> None:
    """On the stand-in for the recorder of CUDA graphs."""
    tape = Tape()
    replayed, plain = (session("internvl", each, **settings) for each in (tape, None))
    for each in (replayed, plain):
        each.push(some_frames(14))
    assert_same_stream(replayed, plain)
    assert tape.replayed >= replays


def assert_a_save_is_refused_without_it(folder: Path, engine: statekv.Engine, stranger: Stranger) -> None:
    """In one line that names what is missing; and nothing is imported because a folder says so."""
    saved = next(folder.glob("*.session"))
    del sys.modules[stranger.module]
    with pytest.raises(ConfigError, match=f"{stranger.module}.*imports nothing by itself"):
        engine.restore(saved)
    assert stranger.module not in sys.modules
    parameters = ", ".join(f"{name}={value}" for name, value in stranger.parameters.items())
    spelled = f"{stranger.module}:{stranger.name}({parameters})"
    assert engine.restore(saved, **{stranger.setting: spelled}).frames == 5

    (folder / f"{stranger.module}.py").unlink()
    del sys.modules[stranger.module]
    importlib.invalidate_caches()
    with pytest.raises(ConfigError, match=stranger.module) as told:
        engine.restore(saved, **{stranger.setting: spelled})
    assert "\n" not in str(told.value)


def test_the_commands_find_a_file_beside_the_reader(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the installed command does, whose path is its own folder."""
    (folder / "beside_the_reader.py").write_text("")
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(folder))])
    assert importlib.util.find_spec("beside_the_reader") is None
    assert command("models").code == 0
    importlib.invalidate_caches()
    assert importlib.util.find_spec("beside_the_reader") is not None
