"""`statekv watch` that is saved while it runs, however it ends, and goes on from there."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import statekv
from statekv.cache.folder import FACTS, read_folder
from statekv.engine.ingest import FrameQueue, PendingStep
from statekv.engine.progress import Progress
from statekv.engine.session import Session
from statekv.errors import MemoryLimitError, SaveError, VideoError
from statekv.evals.cards.render import write_film
from statekv.evals.cards.world import FIRST_TEST_SEED, write_story
from statekv.video.frame import Frame
from tests.cli.test_cli import COUNT, succeed
from tests.cli.test_errors import refused
from tests.cli.test_watch import Terminal, watch
from tests.video.fixtures.broadcast import TcpServer, encoded, paced

FRAMES = 12
OFTEN = ("--autosave", "0.0001s")  # after each step
FULL = SaveError("x cannot be written: No space left on device", "make room")


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("watch") / "film.mp4"
    write_film(write_story(FIRST_TEST_SEED, float(FRAMES)), path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "kept"


@pytest.fixture
def saves(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Frames at each try to save; a test may say which tries fail."""
    found: list[int] = []
    _saving(monkeypatch, found, lambda number: False)
    return found


def _saving(monkeypatch: pytest.MonkeyPatch, tried: list[int], fails: Callable[[int], bool]) -> None:
    original = Session.save

    def save(session: Session, where: Path) -> None:
        tried.append(session.frames)
        if fails(len(tried)):
            raise FULL
        original(session, where)

    monkeypatch.setattr(Session, "save", save)


def frames_in(folder: Path) -> int:
    frames: int = read_folder(folder).facts["stream"]["frames"]
    return frames


def failing(monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException) -> None:
    """A step that fails, in the stead of the frame with this number."""
    original, count = FrameQueue.put, 0

    def put(queue: FrameQueue, frame: Frame, lent: bool = False) -> PendingStep | Progress | None:
        nonlocal count
        if (count := count + 1) == at:
            raise error
        return original(queue, frame, lent)

    monkeypatch.setattr(FrameQueue, "put", put)


def test_saved_at_the_end_and_restored_it_answers_alike(
    film: Path, folder: Path, saves: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = watch(monkeypatch, f"{COUNT}\n", film, "--save", folder)
    assert found.code == 0
    assert "saved at 0:00:11" in found.err
    assert saves == [FRAMES]  # once, although questions come after the end
    expected = succeed("ask", film, COUNT)
    assert succeed("ask", "--restore", folder, COUNT) == expected
    again = watch(monkeypatch, f"{COUNT}\n", film, "--restore", folder, "--save", folder)
    assert again.out == f"[0:00:11] {COUNT}\n{expected}"
    assert saves == [FRAMES]  # nothing was new


def test_saved_between_steps(film: Path, folder: Path, saves: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the folder each time is a stream that stops there."""
    assert watch(monkeypatch, "", film, "--save", folder, *OFTEN).code == 0
    assert saves == list(range(1, FRAMES + 1))
    with statekv.load("demo").open(film) as session:
        session.watch()
        assert succeed("ask", "--restore", folder, COUNT) == session.ask(COUNT) + "\n"


def test_questions_come_in_between(film: Path, folder: Path, saves: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    line = ("--ask-every", "4s", COUNT)
    plain = watch(monkeypatch, "", film, *line)
    kept = watch(monkeypatch, "", film, *line, "--save", folder, *OFTEN)
    assert kept.out == plain.out
    assert len(saves) == FRAMES


def test_one_line_for_the_first_start_and_all_later_ones(
    film: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = (film, "--save", folder, "--restore", folder, "--budget", "50")
    with monkeypatch.context() as patch:
        failing(patch, 5, KeyboardInterrupt())
        first = watch(patch, "", *line, "--autosave", "1h")
    assert first.code == 0
    assert "statekv: interrupted" in first.err
    assert frames_in(folder) == 4
    assert watch(monkeypatch, "", *line).code == 0
    assert frames_in(folder) == FRAMES - 1  # the test took one


@pytest.mark.parametrize("error", [VideoError("film.mp4 has gone away"), RuntimeError("a bug")])
def test_an_error_loses_nothing_that_was_seen(
    error: Exception, film: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, 5, error)
    if isinstance(error, VideoError):
        assert watch(monkeypatch, "", film, "--save", folder).code == 1
    else:
        with pytest.raises(RuntimeError):
            watch(monkeypatch, "", film, "--save", folder)
    assert frames_in(folder) == 4


def test_a_session_that_cannot_go_on_does_not_replace_one_that_can(
    film: Path, folder: Path, saves: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, 5, MemoryLimitError("out of memory in a step", "lower budget"))
    assert watch(monkeypatch, "", film, "--save", folder, "--autosave", "1h").code == 1
    assert saves == [4]  # there was none that it would have replaced
    failing(monkeypatch, 7, MemoryLimitError("out of memory in a step", "lower budget"))
    assert watch(monkeypatch, "", film, "--save", folder, *OFTEN).code == 1
    assert saves == [4, 1, 2, 3, 4, 5, 6]


def test_a_save_that_fails_is_told_once_and_tried_again(
    film: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []
    _saving(monkeypatch, tried, lambda number: 3 <= number <= 6)
    found = watch(monkeypatch, "", film, "--save", folder, *OFTEN)
    assert found.code == 0
    assert tried == list(range(1, FRAMES + 1))
    told, summary = found.err.splitlines()
    assert told == f"statekv: {FULL}; it will be tried again"
    assert "saved at 0:00:11" in summary
    assert frames_in(folder) == FRAMES


def test_where_the_last_save_fails_the_command_does(film: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    _saving(monkeypatch, tried, lambda number: number > 2)
    found = watch(monkeypatch, "", film, "--save", folder, *OFTEN)
    assert found.code == 1
    assert "not saved since 0:00:02" in found.err.splitlines()[-1]
    assert len([line for line in found.err.splitlines() if "No space left" in line]) == 1
    assert frames_in(folder) == 2


def test_a_live_source_goes_on_behind_a_gap(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, log = TcpServer(paced(encoded(20)), paced(encoded(20))), tmp_path / "answers.jsonl"
    line = (server.url, "--fps", "5", "--reconnect-seconds", "0", "--save", folder, "--restore", folder)
    counts = []
    for _ in range(2):
        found = watch(monkeypatch, f"{COUNT}\n", *line, "--log", log)
        assert found.code == 0
        counts.append(frames_in(folder))
    assert counts[0] < counts[1]
    first, second = (json.loads(text) for text in log.read_text(encoding="utf-8").splitlines())
    assert first["pts_seconds"] <= second["pts_seconds"]
    assert "1 gaps" in found.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["x.mp4", "--autosave", "60s"], "--autosave is '60s', but nothing says where to save (add --save FOLDER)"),
        (["x.mp4", "--autosave", "often", "--save", "kept"], "--autosave is 'often'"),
        (["FILM", "--restore", "nowhere"], "nowhere does not exist"),
        (["FILM", "--save", "."], "holds other files"),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: list[str], told: str, film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photo.jpg").touch()
    assert told in refused("watch", *(str(film) if argument == "FILM" else argument for argument in arguments))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--method", "full"], "--method was given with --restore"),
        (["--realtime"], "--realtime was given with --restore"),
        (["--budget", "41"], "was watched with --budget 4096, not 41"),
    ],
)
def test_what_a_session_has_once_and_for_all(
    arguments: list[str], told: str, film: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch(monkeypatch, "", film, "--save", folder)
    assert told in refused("watch", film, "--restore", folder, *arguments)


@pytest.fixture
def terminal(film: Path, folder: Path, ending: signal.Signals) -> Iterator[Terminal]:
    """Where Ctrl-C itself does not end it, it is ignored, which the others do not mind."""
    line = (film, "--realtime", "--fps", "5", "--save", folder, "--autosave", "1h")
    found = Terminal(*line, background=ending != signal.SIGINT)
    yield found
    found.close()


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_asked_to_end_it_saves_first(terminal: Terminal, folder: Path, ending: signal.Signals) -> None:
    terminal.expect(r"[3-9] frames · lag")
    assert not (folder / FACTS).exists()
    terminal.process.send_signal(ending)
    terminal.expect(r"statekv: interrupted · 0:00:\d\d · \d+ frames · .*saved at 0:00:\d\d")
    assert terminal.leave() == 0
    assert frames_in(folder) >= 3
    assert json.loads((folder / FACTS).read_text())["source"]["live"]
