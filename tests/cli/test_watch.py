"""`statekv watch`: in a pipe inside this process, and on a real terminal of its own."""

from __future__ import annotations

import io
import json
import os
import re
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

import statekv
from statekv.cli import console
from statekv.cli.options import clock, seconds_of
from statekv.cli.terminal import Facts, Line, Plain, Questions, _lines
from statekv.cli.watch import AnswerLog, StandingQuestion
from statekv.errors import ConfigError, OutputError
from statekv.evals.cards.render import write_film
from statekv.evals.cards.world import FIRST_TEST_SEED, write_story
from tests.cache.test_folder import files_of_at_most
from tests.cli.test_cli import COLOR, COUNT, Result, command
from tests.cli.test_errors import refused
from tests.processes.forked import Process

FRAMES = 12


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("watch") / "film.mp4"
    write_film(write_story(FIRST_TEST_SEED, float(FRAMES)), path)
    return path


def watch(monkeypatch: pytest.MonkeyPatch, typed: str, *arguments: str | Path) -> Result:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    return command("watch", *arguments)


# In a pipe


def test_questions_come_in_as_lines_and_go_out_as_lines(film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = watch(monkeypatch, f"{COUNT}\n\n  {COLOR}  \n", film)
    assert found.code == 0
    asked, first, asked_too, second = found.out.splitlines()
    assert re.fullmatch(rf"\[0:00:\d\d\] {re.escape(COUNT)}", asked)
    assert asked_too.endswith(COLOR)
    assert first
    assert second
    (line,) = found.err.splitlines()
    assert line.startswith(f"statekv: ended · 0:00:11 · {FRAMES} frames · ")
    used, reserved = re.search(r"detailed ([\d.]+) KiB of ([\d.]+) MiB", line).groups()  # type: ignore[union-attr]
    assert float(used) < float(reserved) * 1024
    assert line.endswith(" 2 answers")


def test_answers_as_json(film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = watch(monkeypatch, f"{COUNT}\n{COLOR}\n", film, "--json", "--log", tmp_path / "log.jsonl")
    assert found.out == (tmp_path / "log.jsonl").read_text()
    assert [json.loads(line)["question"] for line in found.out.splitlines()] == [COUNT, COLOR]


def test_a_standing_question_is_asked_by_the_streams_time(
    film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "answers.jsonl"
    for _ in range(2):
        found = watch(monkeypatch, "", film, "--ask-every", "4s", COUNT, "--log", log)
        assert found.code == 0
    answers = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert [answer["pts_seconds"] for answer in answers] == [4.0, 8.0] * 2
    assert [answer["frames"] for answer in answers] == [5, 9] * 2
    assert {(answer["question"], answer["standing"]) for answer in answers} == {(COUNT, True)}
    assert [answer["text"] for answer in answers[:2]] == found.out.splitlines()[1::2]


def test_answers_meanwhile_are_those_of_a_stream_that_ends_there(
    film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import statekv

    found = watch(monkeypatch, "", film, "--ask-every", "4s", COUNT)
    with statekv.load("demo").open(film) as session:
        session.watch(until_seconds=4.0)
        assert session.ask(COUNT) == found.out.splitlines()[1]


def test_quit_ends_it(film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = watch(monkeypatch, "quit\n", film, "--realtime")
    assert (found.code, found.out) == (0, "")
    assert "statekv: left" in found.err


def test_a_question_that_cannot_be_asked_is_one_line_and_the_stream_goes_on(
    film: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = watch(monkeypatch, "what is <img>?\n", film)
    assert found.code == 0
    assert "<img>" in found.err.splitlines()[0]
    assert f"{FRAMES} frames" in found.err.splitlines()[-1]


def test_standard_input_that_is_closed_asks_nothing(film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    found = command("watch", film)
    assert (found.code, found.out) == (0, "")


def test_a_line_that_is_not_utf8_is_told_and_the_others_are_asked(film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = io.TextIOWrapper(io.BytesIO(f"{COUNT}\n".encode() + b"wie viele K\xe4fer?\n" + COLOR.encode()))
    monkeypatch.setattr(sys, "stdin", lines)
    found = command("watch", film)
    assert found.code == 0
    assert [line.partition("] ")[2] for line in found.out.splitlines()[::2]] == [COUNT, COLOR]
    assert "not UTF-8 text, and is left out: wie viele K\ufffdfer?" in found.err.splitlines()[0]


def test_a_line_without_end_is_read_no_further(capsys: pytest.CaptureFixture[str]) -> None:
    questions = Questions()
    with Path("/dev/zero").open("rb") as endless:
        _lines(questions, endless)
    assert questions.closed
    assert not questions
    assert "a line without end" in capsys.readouterr().err


def test_a_log_that_is_full_is_told_once_and_the_stream_goes_on(film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = watch(monkeypatch, f"{COUNT}\n{COLOR}\n", film, "--log", "/dev/full")
    assert found.code == 1
    assert len(found.out.splitlines()) == 4
    told, summary = found.err.splitlines()
    assert told == "statekv: /dev/full cannot be written: no space left on device; this answer is not in it"
    assert summary.endswith("2 answers")


def test_a_line_of_a_log_is_whole_or_not_there(tmp_path: Path) -> None:
    log, told = AnswerLog(tmp_path / "answers.jsonl"), list[str]()
    log.write("first", told.append)
    with files_of_at_most(8):
        log.write("second", told.append)
        log.write("third", told.append)
    log.write("fourth", told.append)
    assert (tmp_path / "answers.jsonl").read_text(encoding="utf-8") == "first\nfourth\n"
    assert len(told) == 1


def test_standard_output_that_is_full_ends_it_and_it_is_saved(
    film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> NoReturn:
        raise OutputError("standard output cannot be written: no space left on device", "make room")

    monkeypatch.setattr(Plain, "piece", full)
    found = watch(monkeypatch, f"{COUNT}\n", film, "--save", tmp_path / "kept")
    assert found.code == 1
    assert found.err.splitlines()[-1].startswith("statekv: standard output cannot be written")
    assert (tmp_path / "kept").is_dir()


def test_the_horizon_ends_the_stream_with_one_line(film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = watch(monkeypatch, f"{COUNT}\n", film, "--fps", "10", "--horizon", "200")
    assert found.code == 1
    told, summary = found.err.splitlines()
    assert "horizon" in told
    assert summary.startswith("statekv: ended")
    assert found.out.splitlines()[1]


def test_past_the_horizon_it_goes_on_where_that_is_wanted(film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = watch(monkeypatch, f"{COUNT}\n", film, "--fps", "10", "--horizon", "200", "--on-horizon", "compact")
    assert found.code == 0
    (summary,) = found.err.splitlines()
    assert f" {2 * FRAMES} frames " in summary


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["no.mp4"], "no.mp4 does not exist"),
        (["/dev/video987"], "no camera /dev/video987"),
        (["gopher://host/x"], "'gopher' is not allowed"),
        (["http://host/x", "--schemes", "file,rtsp"], "'http' is not allowed"),
        (["x.mp4", "--schemes", "file,data"], "unknown scheme 'data'"),
        (["tcp://127.0.0.1:1"], "connection refused"),
        (["x.mp4", "--ask-every", "soon", COUNT], "--ask-every is 'soon'"),
        (["x.mp4", "--ask-every", "0s", COUNT], "--ask-every is '0s'"),
        (["x.mp4", "--max-lag-seconds", "-1"], "--max-lag-seconds is -1"),
    ],
)
def test_what_is_wrong_is_one_line(arguments: list[str], told: str) -> None:
    assert told in refused("watch", *arguments)


def test_a_log_that_cannot_be_written(film: Path, tmp_path: Path) -> None:
    assert "cannot be written" in refused("watch", film, "--log", tmp_path / "no" / "answers.jsonl")


def test_standard_input_that_is_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.isatty", lambda _: True)
    assert "standard input is a terminal" in refused("watch", "-")


def test_a_stream_that_stands_still_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(console, "SECONDS_OF_SILENCE", 0.0)
    monkeypatch.setattr(console, "remark", said.append)
    session = statekv.load("demo").open()
    Plain(Facts(session, "rtsp://camera")).tick()
    assert said == ["playing · 0:00:00 · 0 frames"]


# On a terminal


class Terminal:
    """`statekv watch` on a pseudo-terminal.

    Args:
        arguments: of the command.
        background: Ctrl-C is ignored, as in what a script has started with `&`.
    """

    def __init__(self, *arguments: str | Path, background: bool = False) -> None:
        import pty

        self._ours, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "24", "OMP_NUM_THREADS": "1"}
        streams = theirs, theirs, theirs
        self.process = Process("watch", *arguments, streams=streams, environment=environment, background=background)
        os.close(theirs)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def expect(self, pattern: str, seconds: float = 60) -> re.Match[str]:
        """Wait until the terminal has shown something; what came before it is forgotten."""
        until = time.monotonic() + seconds
        while (found := re.search(pattern, self.shown)) is None:
            assert time.monotonic() < until, f"{pattern} was not shown: {self.shown[-2000:]}"
            if select.select([self._ours], [], [], 0.1)[0]:
                self.shown += self._read()
        self.shown = self.shown[found.end() :]
        return found

    def leave(self) -> int:
        """The exit code."""
        while (code := self.process.poll()) is None:
            if select.select([self._ours], [], [], 0.1)[0]:
                self.shown += self._read()
        return code

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)

    def _read(self) -> str:
        try:
            data = os.read(self._ours, 65536).decode(errors="replace")
        except OSError:  # the other side is closed
            return ""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", data)


@pytest.fixture
def terminal(film: Path) -> Iterator[Terminal]:
    found = Terminal(film, "--realtime", "--fps", "5")
    yield found
    found.close()


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_on_a_terminal_questions_are_typed_while_the_stream_runs(terminal: Terminal) -> None:
    terminal.expect(r"film\.mp4 · live")
    terminal.expect(r"\d+ frames · lag \d+\.\d s · \d+ dropped")
    terminal.expect(r"ms per step · \d+ tokens carried · carried")
    terminal.type("how many cardsx")
    terminal.expect(r"\? how many cardsx▏")
    terminal.type("\x7f?\n")
    terminal.expect(r"\[0:00:\d\d\] how many cards\?\r?\n\S+")
    frames = int(terminal.expect(r"(\d+) frames")[1])
    terminal.expect(rf"(?<!\d)({'|'.join(str(later) for later in range(frames + 1, frames + 30))}) frames")
    terminal.type("quit\n")
    terminal.expect(r"statekv: left · 0:00:\d\d · \d+ frames · .* · 1 answer\b")
    assert terminal.leave() == 0


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_what_is_typed_while_the_model_loads_is_asked(terminal: Terminal) -> None:
    terminal.type(f"{COUNT}\n")
    terminal.expect(rf"\[0:00:\d\d\] {re.escape(COUNT)}\r?\n\S+")
    terminal.type("\x04")
    terminal.expect("statekv: left")
    assert terminal.leave() == 0


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_ctrl_c_ends_it_cleanly_and_gives_the_terminal_back(terminal: Terminal) -> None:
    import termios

    terminal.expect(r"\d+ frames · lag")
    assert not termios.tcgetattr(terminal._ours)[3] & termios.ECHO
    terminal.process.send_signal(signal.SIGINT)
    terminal.expect(r"statekv: interrupted · 0:00:\d\d · \d+ frames")
    assert terminal.leave() == 0
    assert "Traceback" not in terminal.shown


# Parts


@pytest.mark.parametrize(
    ("keys", "lines", "rest"),
    [
        ("what?\r", ["what?"], ""),
        ("a\nb\nc", ["a", "b"], "c"),
        ("abc\x7f\x7fd", [], "ad"),
        ("one two \x17three", [], "onethree"),
        ("gone\x15kept", [], "kept"),
        ("a\x1b[Db\x1b[3~c\x1b[1;5Cd", [], "abcd"),
        ("Käfer 🙂\n", ["Käfer 🙂"], ""),
        ("\x00\x01x\x04", [], "x"),
    ],
)
def test_typing(keys: str, lines: list[str], rest: str) -> None:
    line = Line()
    assert [done for key in keys if (done := line.press(key)) is not None] == lines
    assert line.text == rest
    assert not line.ended


def test_ctrl_d_on_an_empty_line_ends_it() -> None:
    line = Line()
    line.press("\x04")
    assert line.ended


def test_questions_wait_in_order() -> None:
    questions = Questions()
    for typed in (" one ", "", "two"):
        questions.add(typed)
    assert [bool(questions), questions.take(), questions.take(), questions.take()] == [True, "one", "two", None]
    assert not questions.quit
    questions.add("exit")
    assert questions.quit


def test_a_standing_question_makes_up_for_nothing() -> None:
    standing = StandingQuestion(10.0, "what?")
    assert [pts for pts in (3.0, 12.9, 13.0, 14.0, 47.0, 48.0, 53.0) if standing.due(pts)] == [13.0, 47.0, 53.0]


@pytest.mark.parametrize(("text", "seconds"), [("30s", 30), ("2m", 120), ("2 min", 120), ("1.5h", 5400), ("7", 7)])
def test_lengths_of_time(text: str, seconds: float) -> None:
    assert seconds_of(text, "--x") == seconds


@pytest.mark.parametrize("text", ["", "s", "-3s", "0", "1d", "1:30"])
def test_what_is_no_length_of_time(text: str) -> None:
    with pytest.raises(ConfigError, match="--x is"):
        seconds_of(text, "--x")


def test_the_clock() -> None:
    assert [clock(seconds) for seconds in (0, 59.9, 61, 360000)] == ["0:00:00", "0:00:59", "0:01:01", "100:00:00"]
