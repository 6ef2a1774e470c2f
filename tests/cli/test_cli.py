"""The command line where all goes well: answers on stdout, nothing else there, and nothing on stderr in a pipe."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from transformers.utils import logging
from typer.main import get_command
from typer.testing import CliRunner

import statekv
from statekv import cli
from statekv.cli import console
from statekv.config import METHODS
from statekv.engine.session import Session
from statekv.evals.cards.compare import METHODS as COMPARED
from statekv.evals.cards.render import write_film
from statekv.evals.cards.world import COLORS, FIRST_TEST_SEED, write_story
from statekv.models import FAMILIES

COUNT, COLOR = "how many cards?", "what color was the square?"
FRAMES = 12
DOCS = Path(__file__).parent.parent.parent / "docs" / "cli.md"
# Make rich believe in a terminal, or in another width.
_TERMINAL = ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "TERMINAL_WIDTH")


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


def command(*arguments: str | Path) -> Result:
    """`statekv` with these arguments inside this process, as if started by itself, its two streams piped."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.dict(os.environ),
        mock.patch.object(sys, "argv", ["statekv", *map(str, arguments)]),
        mock.patch.object(sys.modules["__main__"], "__package__", None),  # else it calls itself pytest
        mock.patch.object(console, "SECONDS_OF_SILENCE", 3600.0),  # on a machine that is busy all take their time
        mock.patch("typer.main.get_command", _made_once),
        warnings.catch_warnings(),
        _quiet_transformers(),
    ):
        for name in _TERMINAL:
            os.environ.pop(name, None)
        warnings.simplefilter("default")
        code: object = 0
        try:
            cli.main()
        except SystemExit as left:
            code = left.code or 0
    assert isinstance(code, int)
    return Result(code, out.getvalue(), err.getvalue())


_made_once = functools.cache(get_command)  # what typer makes of the signatures of all commands, else at every start


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """What the variables that `main` sets do to a transformers that is not imported yet."""
    before = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()


def succeed(*arguments: str | Path) -> str:
    """What a command writes to stdout, which must succeed without a word on stderr."""
    found = command(*arguments)
    assert (found.code, found.err) == (0, "")
    return found.out


def subprocess_command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The installed `statekv` in a process of its own; skips where that cannot work."""
    installed = Path(sys.executable).with_name("statekv")
    if not installed.exists():
        pytest.skip("statekv is not installed as a command beside this interpreter")
    _skip_beside_torchvision()
    environment = {name: value for name, value in os.environ.items() if name not in _TERMINAL}
    line = [str(installed), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, env=environment, check=False)


@functools.cache
def _skip_beside_torchvision() -> None:
    find = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torchvision') is not None)"
    if subprocess.run([sys.executable, "-c", find], check=False).returncode:
        pytest.skip("a torchvision is installed that may not fit torch, and nothing declares its operators there")


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "film.mp4"
    write_film(write_story(FIRST_TEST_SEED, float(FRAMES)), path)
    return path


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[Session]:
    """Every session that was watched."""
    found: list[Session] = []
    original = Session.watch

    def watch(session: Session, *args: Any, **kwargs: Any) -> None:
        found.append(session)
        original(session, *args, **kwargs)

    monkeypatch.setattr(Session, "watch", watch)
    return found


def ask_directly(film: Path, *questions: str, **settings: Any) -> list[str]:
    engine = statekv.load("demo", **settings)
    with engine.open(film) as session:
        session.watch()
        return [session.ask(question) for question in questions]


def test_an_answer_is_one_line_on_stdout(film: Path) -> None:
    assert succeed("ask", film, COUNT) == ask_directly(film, COUNT)[0] + "\n"


def test_several_questions_share_one_prefill(film: Path, watched: list[Session]) -> None:
    questions = (COUNT, COLOR, "what came after the green card?")
    out = succeed("ask", film, *questions)
    assert len(watched) == 1
    assert out.splitlines() == ask_directly(film, *questions)


def test_questions_from_standard_input_and_from_a_file(
    film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "questions.txt").write_text(f"\n{COLOR}\n", encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{COUNT}\n\n  {COLOR}  \n"))
    out = succeed("ask", film, "-", COUNT, "--questions", tmp_path / "questions.txt")
    assert out == succeed("ask", film, COUNT, COLOR, COUNT, COLOR)
    monkeypatch.setattr(sys, "stdin", io.StringIO(COLOR))
    assert succeed("ask", film, "--questions", "-") == succeed("ask", film, COLOR)


def test_json_has_an_object_per_answer(film: Path, watched: list[Session]) -> None:
    found = [json.loads(line) for line in succeed("ask", film, COUNT, COLOR, "--json", "--budget", "40").splitlines()]
    assert len(watched) == 1
    assert [answer["question"] for answer in found] == [COUNT, COLOR]
    assert [answer["text"] for answer in found] == ask_directly(film, COUNT, COLOR, budget=40)
    for answer in found:
        assert (answer["model"], answer["method"], answer["layout"]) == ("demo", "statekv", "hf")
        assert (answer["carry"], answer["recall"], answer["kernel"]) == ("attention", "all", "blocked")
        assert (answer["budget"], answer["carried"], answer["frames"]) == (40, 40, FRAMES)
        assert answer["positions"] == answer["tokens"] > 40
        assert answer["horizon"] == 32768
        assert set(answer["seconds"]) == {"decode", "vision", "prefill", "answer"}
        assert all(seconds > 0 for seconds in answer["seconds"].values())
        assert set(answer["bytes"]) == {"carried", "detailed", "blocks", "memories"}
        assert 0 < answer["bytes"]["carried"] < answer["bytes"]["detailed"]
        a_token = 5 * 2 * 32 * 2 * 4
        used = {**answer["bytes"], "carried": 40 * a_token, "detailed": answer["tokens"] * a_token}
        assert answer["bytes_used"] == used
    # Each with its own time to answer, both with the same prefill.
    assert found[0]["seconds"]["prefill"] == found[1]["seconds"]["prefill"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_answers(film: Path, method: str) -> None:
    budget = ("--budget", "30") if METHODS[method]["carry"] != "all" else ()
    answer = json.loads(succeed("ask", film, COUNT, "--method", method, *budget, "--json"))
    assert answer["method"] == method
    assert (answer["carry"], answer["recall"]) == (METHODS[method]["carry"], METHODS[method]["recall"])
    assert answer["frames"] == (2 * FRAMES if method == "uniform" else FRAMES)  # all of them are fewer than 64
    assert answer["carried"] == (answer["tokens"] if answer["carry"] == "all" else 30)
    assert (answer["tokens"] > 0) == (method != "last_frames")


def test_a_dial_wins_over_the_method(film: Path) -> None:
    answer = json.loads(succeed("ask", film, COUNT, "--method", "streaming_llm", "--recall", "all", "--json"))
    assert answer["method"] == "sink_recent+all"


def test_retrieval_is_chosen_step_by_step(film: Path) -> None:
    line = ("ask", film, COUNT, "--json", "--method", "full", "--recall", "retrieve")
    every = json.loads(succeed("ask", film, COUNT, "--json", "--method", "full"))
    assert json.loads(succeed(*line, "--retrieve", str(FRAMES)))["text"] == every["text"]
    options = "--retrieve 1 --retrieve-newest 2 --retrieve-positions reindex"
    found = json.loads(succeed(*line, *options.split()))
    dials = {"retrieve": 1, "retrieve_newest": 2, "retrieve_positions": "reindex"}
    assert [found["text"]] == ask_directly(film, COUNT, method="full", recall="retrieve", **dials)
    assert found["bytes"]["blocks"] > 0
    carried = ("--method", "statekv_retrieve", "--retrieve", "1", "--retrieve-carried", "--budget", "40")
    assert succeed("ask", film, COUNT, *carried).strip()


def test_the_dials_of_attention_arrive(film: Path, watched: list[Session]) -> None:
    options = "--budget 40 --decay 0.5 --value-norms --layer-slope 0.5 --pin-newest 1 --coverage 0.25"
    answer = json.loads(succeed("ask", film, COUNT, "--json", *options.split()))
    config = watched[0].state.config
    assert (config.decay, config.value_norms, config.layer_slope) == (0.5, True, 0.5)
    assert (config.pin_newest, config.coverage) == (1, 0.25)
    assert (answer["budget"], answer["carried"]) == (40, 60)  # the first layer's


def test_a_methods_prefix_stays_pinned_unless_told_otherwise(film: Path) -> None:
    line = ("ask", film, COUNT, "--json", "--budget", "30", "--method", "rekv")
    assert json.loads(succeed(*line))["method"] == "rekv"
    assert json.loads(succeed(*line, "--no-pin-prefix"))["method"] == "recent+retrieve"


def test_options_arrive(film: Path) -> None:
    options = "--max-frames 5 --layout release --kernel naive --horizon 3000 --dtype bfloat16"
    answer = json.loads(succeed("ask", film, COUNT, "--json", *options.split()))
    assert (answer["frames"], answer["layout"], answer["kernel"], answer["horizon"]) == (5, "release", "naive", 3000)
    assert answer["compacted"] == 1
    short = json.loads(succeed("ask", film, COUNT, "--json", "--horizon", "96", "--on-horizon", "compact"))
    assert (short["frames"], short["horizon"]) == (FRAMES, 96)
    assert short["compacted"] > 1
    assert json.loads(succeed("ask", film, COUNT, "--json", "--fps", "0.5"))["frames"] == FRAMES // 2
    assert json.loads(succeed("ask", film, COUNT, "--json", "--fps", "2"))["frames"] == 2 * FRAMES
    short = succeed("ask", film, COLOR, "--max-new-tokens", "1").strip()
    assert len(statekv.load("demo").model.tokenizer(short)["input_ids"]) == 1


def test_random_repeats_for_a_seed(film: Path) -> None:
    line = ("ask", film, COUNT, COLOR, "--method", "random", "--budget", "20", "--seed", "3")
    assert succeed(*line) == succeed(*line)


def test_models_lists_every_family_and_the_demo() -> None:
    lines = succeed("models").splitlines()
    for name, family in FAMILIES.items():
        (start,) = [i for i, line in enumerate(lines) if line.startswith(f"{name}: ")]
        assert f" {family.tokens_per_frame:g}" in lines[start]
        for line, checkpoint in zip(lines[start + 1 :], family.checkpoints, strict=False):
            told, _, _, per_token, per_hour = line.split()
            assert told == checkpoint.name
            assert float(per_token) * 1024 == checkpoint.bytes_per_token
            gib = 3600 * family.tokens_per_frame * checkpoint.bytes_per_token / 2**30
            assert float(per_hour) == pytest.approx(gib, rel=0.05)
    assert any(line.split()[:1] == ["demo"] for line in lines)


def test_models_as_data() -> None:
    rows = [json.loads(line) for line in succeed("models", "--json").splitlines()]
    known = {
        checkpoint.name: (name, checkpoint) for name, family in FAMILIES.items() for checkpoint in family.checkpoints
    }
    assert [row["model"] for row in rows] == list(known)
    for row in rows:
        family, checkpoint = known[row["model"]]
        assert (row["family"], row["bytes_per_token"]) == (family, checkpoint.bytes_per_token)
        assert row["tokens_per_frame"] == FAMILIES[family].tokens_per_frame


def test_models_tells_the_demo_as_it_is() -> None:
    engine = statekv.load("demo")
    spec = engine.model.kv_spec()
    (line,) = [line for line in succeed("models").splitlines() if line.split()[:1] == ["demo"]]
    per_token = spec.bytes_per_token * 2 / spec.dtype.itemsize
    assert float(line.split()[3]) * 1024 == per_token
    assert float(line.split()[1]) * 1e9 == pytest.approx(
        sum(p.numel() for p in engine.model.model.parameters()), rel=0.05
    )


def test_models_tells_of_every_family_what_it_was_tested_against_and_whose_code_runs() -> None:
    told = succeed("models")
    _, tested = told.split("Tested token for token against\n")
    for name, family in FAMILIES.items():
        (line,) = [line for line in tested.splitlines() if line.strip().startswith(f"{family.tested}: ")]
        assert name in line.partition(": ")[2].split(", ")
        for checkpoint in family.checkpoints:
            runs = f"{checkpoint.name} runs code of its own, with --trust-remote-code alone. Commit: " in told
            assert runs == family.own_code


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("demo") / "a-folder-whose-name-makes-every-line-that-mentions-it-a-long-one"
    return folder, command("demo", "--videos", "1", "--frames", "24", "--budget", "40", "--folder", folder, "--json")


def test_the_demo_compares_all_methods(shown: tuple[Path, Result]) -> None:
    folder, found = shown
    assert found.code == 0
    report = json.loads(found.out)
    assert (report["videos"], report["frames"], report["budget"]) == (1, 24, 40)
    assert [method["method"] for method in report["methods"]] == list(COMPARED)
    by_name = {method["method"]: method for method in report["methods"]}
    assert by_name["full"]["kl_to_full"] == 0
    assert by_name["full"]["carried_tokens"] <= report["tokens"]
    assert by_name["statekv"]["carried_tokens"] == 40
    assert len(by_name["statekv"]["ms_per_step_tenths"]) == 10
    assert {path.name for path in folder.iterdir()} == {"cards-0.mp4", "step-time.png"}


def test_the_demo_says_in_one_line_where_its_files_are(shown: tuple[Path, Result]) -> None:
    folder, found = shown
    (line,) = found.err.splitlines()
    assert str(folder / "step-time.png") in line
    assert str(folder / "cards-0.mp4") in line


def test_the_video_of_the_demo_can_be_asked(shown: tuple[Path, Result]) -> None:
    assert succeed("ask", shown[0] / "cards-0.mp4", COUNT).strip()


def test_the_demo_shows_a_table_that_a_pipe_does_not_cut(tmp_path: Path) -> None:
    found = command("demo", "--videos", "1", "--frames", "20", "--folder", tmp_path / "d")
    assert found.code == 0
    for method in COMPARED:
        (line,) = [line for line in found.out.splitlines() if re.match(rf"\W*{method} ", line)]
        assert len(re.findall(r"[\d.]+", line)) == 6  # accuracy, KL, two times, carried, KiB
    assert "…" not in found.out
    assert "guessing would get" in found.out


def test_a_film_to_begin_with(tmp_path: Path) -> None:
    """It is written once; what is there already may be somebody's own."""
    found = command("film", tmp_path / "f.mp4", "--seconds", "4")
    assert (found.code, found.out) == (0, "")
    assert f'statekv ask {tmp_path / "f.mp4"} "how many cards?"' in found.err
    before = (tmp_path / "f.mp4").read_bytes()
    assert "left as it is" in command("film", tmp_path / "f.mp4", "--seed", "8").err
    assert (tmp_path / "f.mp4").read_bytes() == before


@pytest.mark.parametrize("arguments", [(), ("ask",), ("demo",), ("models",)])
def test_help(arguments: tuple[str, ...]) -> None:
    out = succeed(*arguments, "--help")
    assert out.lstrip().startswith("Usage: statekv")
    assert len(out.splitlines()) > 5


def test_help_of_ask_names_what_can_be_chosen() -> None:
    found = CliRunner().invoke(cli.app, ["ask", "--help"], env={"COLUMNS": "400"})
    assert found.exit_code == 0
    for name in (*METHODS, "sink_recent", "release", "blocked", "bfloat16"):
        assert name in found.output


def test_the_documentation_of_the_commands_is_current() -> None:
    if not DOCS.exists():
        pytest.skip("docs/cli.md is not there yet")
    from typer.cli import app

    line = ["statekv.cli", "utils", "docs", "--name", "statekv"]
    found = CliRunner().invoke(app, line)
    assert found.exit_code == 0, found.output
    hint = f"make it anew: typer {' '.join(line)} --output docs/cli.md"
    assert DOCS.read_text(encoding="utf-8").strip() == found.stdout.strip(), hint


def test_the_installed_command_answers_in_a_pipe(film: Path) -> None:
    found = subprocess_command("ask", film, COUNT, COLOR, "--quiet")
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.splitlines() == ask_directly(film, COUNT, COLOR)


def test_colors_of_the_world_are_what_the_demo_answers_with(film: Path) -> None:
    assert succeed("ask", film, COLOR).strip() in COLORS


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
