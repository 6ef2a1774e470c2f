"""Killed, cut off, walked away from: nothing is lost of what was saved, and nothing is changed by who only asked."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from statekv.cache.detailed import DetailedCache
from statekv.cache.folder import FACTS, read_folder
from statekv.engine.session import Session
from statekv.evals.cards.render import write_film
from statekv.evals.cards.world import FIRST_TEST_SEED, write_story
from statekv.video.writer import write_video
from tests.cli.test_cli import COUNT, succeed
from tests.engine.test_snapshot import assert_same_session
from tests.processes.forked import run as run_command
from tests.processes.killing import kill_at_moments
from tests.talk import QUESTION, assert_same_memory, memory, shared_engine, some_frames
from tests.tiny import video

FRAMES, EVERY = 12, 2  # frames of a stream, and between two saves
SETTINGS: dict[str, Any] = {"budget": 30, "vision_batch": 3}

# Killed in the middle of a step


def opened(family: str, clip: Path | None) -> Session:
    return shared_engine(family).open(clip, **SETTINGS)


def go_on(session: Session, until: int) -> None:
    """Let frames enter, from a file or pushed, until there are so many."""
    if session.source is not None:
        session.watch(until_seconds=until - 1)
    else:
        session.push(some_frames(FRAMES)[session.frames : until])


def run(family: str, clip: Path | None, folder: Path, saved: Callable[[int], None]) -> None:
    """A stream that is saved now and then, as `statekv watch --autosave` does it."""
    session = opened(family, clip)
    for frames in range(EVERY, FRAMES + 1, EVERY):
        go_on(session, frames)
        session.save(folder)
        saved(frames)


# Every write into either memory, every eviction, every file and rename of a save.
_IMPORTS = """
from statekv.cache import folder
from statekv.cache.carried import CarriedCache
from statekv.cache.detailed import DetailedCache
from tests.method.test_faults import run, shared_engine
"""
_CALLS = """
    (CarriedCache, "update"), (CarriedCache, "evict"), (DetailedCache, "append"),
    (folder, "save_file"), (os, "replace"),
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("family", "reads_a_file", "stride"), [("internvl", False, 29), ("internvl", True, 61), ("qwen3_vl", False, 61)]
)
def test_killed_at_any_moment_of_a_step_or_a_save_it_goes_on(
    family: str, reads_a_file: bool, stride: int, tmp_path: Path
) -> None:
    clip, rounds = tmp_path / "clip.mp4", tmp_path / "rounds"
    if reads_a_file:
        write_video(clip, video(2 * FRAMES), fps=2)
    rounds.mkdir()
    film = f"Path({str(clip)!r})" if reads_a_file else None
    tell = 'lambda frames: (place / "told").write_text(str(frames))'
    call = f'run({family!r}, {film}, place / "saved", {tell})'
    kill_at_moments(_IMPORTS, _CALLS, f"shared_engine({family!r})", call, rounds, stride)
    never = opened(family, clip if reads_a_file else None)
    go_on(never, FRAMES)
    found = set()
    for place in rounds.iterdir():
        told = int((place / "told").read_text()) if (place / "told").exists() else 0
        if not (place / "saved" / FACTS).exists():
            assert not told
            continue
        restored = shared_engine(family).restore(place / "saved")
        assert restored.frames in (told, told + EVERY)  # what was saved, perhaps before that could be told
        found.add(restored.frames)
        go_on(restored, FRAMES)
        assert_same_session(restored, never)
    assert len(found) > 3


# Gone in the middle of an answer


def _drops_it(answer: Generator[str, None, None]) -> None:
    next(answer)
    del answer


def _closes_it(answer: Generator[str, None, None]) -> None:
    next(answer)
    answer.close()


def _closes_it_before_it_begins(answer: Generator[str, None, None]) -> None:
    answer.close()


def _cannot_write(answer: Generator[str, None, None]) -> None:
    def show(piece: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        list(map(show, answer))


def _interrupts_it(answer: Generator[str, None, None]) -> None:
    next(answer)
    with pytest.raises(KeyboardInterrupt):
        answer.throw(KeyboardInterrupt())


@pytest.mark.parametrize("family", ["internvl", "qwen3_vl"])
@pytest.mark.parametrize("leaves", [_drops_it, _closes_it, _closes_it_before_it_begins, _cannot_write, _interrupts_it])
def test_who_leaves_in_the_middle_of_an_answer_leaves_nothing(
    leaves: Callable[[Generator[str, None, None]], None], family: str, tmp_path: Path
) -> None:
    asked, never = opened(family, None), opened(family, None)
    for session in (asked, never):
        go_on(session, 7)
    leaves(asked.stream(QUESTION))
    assert_as_if_never_asked(asked, never, tmp_path)


@pytest.mark.parametrize("calls", [1, 2, 5])
def test_an_interrupt_between_two_layers_of_an_answer_leaves_nothing(
    calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some layers hold a token more than the others then."""
    asked, never = opened("internvl", None), opened("internvl", None)
    for session in (asked, never):
        go_on(session, 7)
    original, left = DetailedCache.update, calls

    def update(*arguments: Any, **more: Any) -> Any:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt
        return original(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(DetailedCache, "update", update)
        with pytest.raises(KeyboardInterrupt):
            asked.ask(QUESTION)
    assert_as_if_never_asked(asked, never, tmp_path)


def assert_as_if_never_asked(asked: Session, never: Session, folder: Path) -> None:
    """Its memory, what is saved of it, its answers, and how it goes on."""
    assert_same_memory(memory(asked), memory(never))
    for name, session in (("asked", asked), ("never", never)):
        session.save(folder / name)
    assert digests(folder / "asked") == digests(folder / "never")
    for session in (asked, never):
        go_on(session, FRAMES)
    assert_same_session(asked, never)


def digests(folder: Path) -> dict[str, str]:
    return {name: file["sha256"] for name, file in read_folder(folder).files.items()}


@pytest.mark.skipif(sys.platform == "win32", reason="pipes end otherwise there")
@pytest.mark.parametrize("command", [["ask", "FILM", COUNT], ["watch", "FILM", "--ask-every", "4s", COUNT]])
def test_a_reader_that_has_gone_is_no_accident(command: list[str], tmp_path: Path) -> None:
    """As in `statekv ask … | head -c1`: what was seen is saved, nobody is shown a traceback."""
    film = tmp_path / "film.mp4"
    write_film(write_story(FIRST_TEST_SEED, 8.0), film)
    arguments = [str(film) if argument == "FILM" else argument for argument in command]
    reader, writer = os.pipe()
    os.close(reader)
    found = run_command(*arguments, "--save", tmp_path / "kept", out=writer)
    os.close(writer)
    assert found.returncode == 1
    assert "Traceback" not in found.stderr
    if command[0] == "ask":
        assert succeed("ask", "--restore", tmp_path / "kept", COUNT) == succeed("ask", film, COUNT)
    else:
        assert read_folder(tmp_path / "kept").facts["stream"]["frames"] == 5
