"""`statekv ask --save` and `--restore`: an hour of video is watched once, whatever happens in between."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import statekv
from statekv.engine.ingest import FrameQueue, PendingStep
from statekv.engine.progress import Progress
from statekv.errors import MemoryLimitError
from statekv.evals.cards.render import write_film
from statekv.evals.cards.world import FIRST_TEST_SEED, write_story
from statekv.models.loading import DEMO
from statekv.video.frame import Frame
from tests.cli.test_cli import COLOR, COUNT, Result, command, succeed
from tests.cli.test_errors import complaint, refused

FRAMES = 12


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "film.mp4"
    write_film(write_story(FIRST_TEST_SEED, float(FRAMES)), path)
    return path


@pytest.fixture(scope="module")
def kept(film: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "kept"
    succeed("ask", film, COUNT, "--budget", "40", "--save", folder)
    return folder


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def interrupted(monkeypatch: pytest.MonkeyPatch, error: BaseException, *arguments: str | Path) -> Result:
    """A command that fails at the fifth frame."""
    original, frames = FrameQueue.put, 0

    def put(queue: FrameQueue, frame: Frame, lent: bool = False) -> PendingStep | Progress | None:
        nonlocal frames
        if (frames := frames + 1) == 5:
            raise error
        return original(queue, frame, lent)

    with monkeypatch.context() as patch:
        patch.setattr(FrameQueue, "put", put)
        return command(*arguments)


def test_a_restored_session_answers_as_the_one_that_was_saved(film: Path, kept: Path) -> None:
    assert succeed("ask", "--restore", kept, COUNT, COLOR) == succeed("ask", film, COUNT, COLOR, "--budget", "40")


def test_it_says_the_same_of_itself(film: Path, kept: Path) -> None:
    expected = json.loads(succeed("ask", film, COUNT, "--budget", "40", "--json"))
    found = json.loads(succeed("ask", "--restore", kept, COUNT, "--json"))
    for answer in (expected, found):
        del answer["seconds"], answer["bytes"]
    assert found == expected


def test_an_interrupted_one_goes_on_where_it_was(film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = succeed("ask", film, COUNT, "--json")
    folder = tmp_path / "kept"
    line = complaint(interrupted(monkeypatch, KeyboardInterrupt(), "ask", film, COUNT, "--save", folder), 130)
    assert line == f"statekv: interrupted after 4 frames; --restore {folder} goes on from there"
    found = succeed("ask", "--restore", folder, COUNT, "--json", "--save", folder)
    assert json.loads(found)["frames"] == FRAMES - 1  # the frame in whose place the interrupt came is the test's doing
    assert json.loads(found)["horizon"] == json.loads(expected)["horizon"]
    assert json.loads(succeed("ask", "--restore", folder, COUNT, "--json"))["text"] == json.loads(found)["text"]


def test_what_was_seen_before_a_failure_is_saved(film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = MemoryLimitError("out of memory in a step", "lower budget")
    found = interrupted(monkeypatch, failure, "ask", film, COUNT, "--save", tmp_path / "kept")
    assert "out of memory" in complaint(found)
    assert (tmp_path / "kept" / "session.json").exists()


def test_answers_go_on_without_the_video(film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Path(shutil.copy(film, tmp_path / "here.mp4"))
    interrupted(
        monkeypatch, KeyboardInterrupt(), "ask", here, COUNT, "--save", tmp_path / "kept", "--vision-batch", "1"
    )
    here.unlink()
    found = command("ask", "--restore", tmp_path / "kept", COUNT)
    assert (found.code, len(found.out.splitlines())) == (0, 1)
    (line,) = found.err.splitlines()
    assert line.startswith("statekv: warning: here.mp4 is not there any more")
    assert line.endswith("the answers are about what was seen")


def test_frames_that_were_pushed_can_be_asked(tmp_path: Path) -> None:
    session = statekv.load("demo").open()
    session.push([Frame(torch.zeros(3, 48, 48, dtype=torch.uint8), float(second)) for second in range(3)])
    session.save(tmp_path / "kept")
    assert succeed("ask", "--restore", tmp_path / "kept", COUNT) == session.ask(COUNT) + "\n"


def test_settings_of_answers_may_change(kept: Path) -> None:
    found = json.loads(succeed("ask", "--restore", kept, COUNT, "--max-new-tokens", "1", "--json"))
    assert len(found["text"].split()) <= 1


def test_the_method_that_it_has_may_be_named(kept: Path) -> None:
    assert succeed("ask", "--restore", kept, COUNT, "--method", "statekv") == succeed("ask", "--restore", kept, COUNT)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--budget", "50"), "was watched with --budget 40, not 50"),
        (("--fps", "2"), "was watched with --fps 1.0, not 2.0"),
        (("--method", "full"), "--method was given with --restore"),
        (("--stream", "0"), "--stream was given with --restore"),
        (("--dtype", "bfloat16"), "in float32, this one is bfloat16"),
    ],
)
def test_what_does_not_fit_to_what_was_saved(kept: Path, arguments: tuple[str, ...], reason: str) -> None:
    assert reason in refused("ask", "--restore", kept, COUNT, *arguments)


def test_another_model(kept: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(DEMO, tmp_path / "checkpoint"))
    assert succeed("ask", "--restore", kept, COUNT, "--model", folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    refused("ask", "--restore", kept, COUNT, "--model", folder)


def test_a_folder_that_is_no_session(tmp_path: Path) -> None:
    assert "holds no saved session" in refused("ask", "--restore", tmp_path, COUNT)
    assert "does not exist" in refused("ask", "--restore", tmp_path / "nowhere", COUNT)


def test_a_damaged_file_is_named(kept: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(kept, tmp_path / "kept"))
    (folder / "layer-01.1.safetensors").write_bytes(b"x")
    assert "its file layer-01.1.safetensors is not as it was written" in refused("ask", "--restore", folder, COUNT)


def test_a_folder_with_other_files_is_refused_before_the_work(
    film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photo.jpg").touch()
    monkeypatch.setattr("statekv.engine.engine.load", lambda *_, **__: 1 / 0)
    assert "holds other files" in refused("ask", film, COUNT, "--save", tmp_path)


def test_no_question(kept: Path) -> None:
    found = command("ask", "--restore", kept)
    assert (found.code, found.out) == (2, "")
    assert "Missing argument 'QUESTIONS...'" in found.err
