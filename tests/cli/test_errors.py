"""The command line where something is wrong: one line that says what, on stderr, and a code; never a traceback."""

from __future__ import annotations

import io
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file, save_file

from statekv import cli
from statekv.config import METHODS, SETTINGS
from statekv.engine.ingest import FrameQueue, PendingStep
from statekv.engine.progress import Progress
from statekv.evals.cards.render import write_film
from statekv.evals.cards.world import FIRST_TEST_SEED, write_story
from statekv.models import FAMILIES
from statekv.models.loading import DEMO
from statekv.video.frame import Frame
from tests.cli.test_cli import COUNT, Result, command
from tests.processes import forked
from tests.video.fixtures.clips import write_sound


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "film.mp4"
    write_film(write_story(FIRST_TEST_SEED, 12.0), path)
    return path


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def complaint(found: Result, code: int = 1) -> str:
    """The one line on stderr."""
    assert (found.code, found.out) == (code, "")
    (line,) = found.err.splitlines()
    assert line.startswith("statekv: ")
    assert "Traceback" not in line
    return line


def refused(*arguments: str | Path) -> str:
    """The complaint of a command that fails."""
    return complaint(command(*arguments))


# Sources


def test_libraries_leave_the_complaint_to_us(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client would report each of its retries."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(cli, "app", lambda: None)
    variables = ("HF_HUB_VERBOSITY", "TRANSFORMERS_VERBOSITY")
    for variable in variables:
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    cli.main()
    assert [os.environ[variable] for variable in variables] == ["error", "error"]


def test_a_missing_file(tmp_path: Path) -> None:
    assert "no.mp4 does not exist" in refused("ask", tmp_path / "no.mp4", COUNT)


def test_a_folder(tmp_path: Path) -> None:
    assert "is a folder" in refused("ask", tmp_path, COUNT)


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    assert "is empty" in refused("ask", tmp_path / "empty.mp4", COUNT)


def test_text_with_the_name_of_a_video(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("not a video at all\n" * 50)
    assert "text.mp4 is not a video" in refused("ask", tmp_path / "text.mp4", COUNT)


def test_a_file_with_sound_alone(tmp_path: Path) -> None:
    assert "only sound" in refused("ask", write_sound(tmp_path / "sound.mp4"), COUNT)


def test_a_protocol_that_nobody_knows() -> None:
    assert "protocol" in refused("ask", "nope://host/film.mp4", COUNT)


def test_a_stream_that_the_file_does_not_have(film: Path) -> None:
    assert "1 video stream" in refused("ask", film, COUNT, "--stream", "3")


def test_nothing_is_loaded_for_a_file_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("statekv.engine.engine.load", _never)
    refused("ask", tmp_path / "no.mp4", COUNT)


def test_a_clip_cut_off_in_the_middle_is_answered_with_a_warning(film: Path, tmp_path: Path) -> None:
    data = film.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 6 // 10])
    found = command("ask", tmp_path / "cut.mp4", COUNT)
    assert found.code == 0
    assert len(found.out.strip().splitlines()) == 1
    (line,) = found.err.splitlines()
    assert line.startswith("statekv: warning: cut.mp4 ends at ")
    assert "of 12.0 s" in line


# Settings


@pytest.mark.parametrize(
    "arguments",
    [
        ("--budget", "0"),
        ("--budget", "-5"),
        ("--fps", "0"),
        ("--fps", "-1"),
        ("--fps", "nan"),
        ("--fps", "inf"),
        ("--max-frames", "0"),
        ("--max-new-tokens", "0"),
        ("--horizon", "0"),
        ("--sinks", "-1"),
        ("--seed", "-1"),
        ("--retrieve", "0"),
        ("--retrieve-newest", "-1"),
        ("--last-frames", "0"),
    ],
)
def test_numbers_outside_of_their_range(film: Path, arguments: tuple[str, str]) -> None:
    assert f"{arguments[0]} is {arguments[1]}" in refused("ask", film, COUNT, *arguments)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (
            "--retrieve-newest 1",
            "--retrieve-newest is 1 with --recall 'all', but means something only with --recall",
        ),
        ("--retrieve 9", "(set --recall to 'retrieve', or leave --retrieve out)"),
        ("--last-frames 9", "--last-frames is 9 with --recall 'all'"),
        ("--method full --budget 9", "--budget is 9 with --carry 'all'"),
        ("--method full --pin-prefix", "--pin-prefix is True with --carry 'all'"),
        ("--method recency_window --kernel naive", "--kernel is 'naive' with --carry 'recent'"),
        ("--method random --score-every 2", "--score-every is 2 with --carry 'random'"),
        ("--bits 4", "--bits is 4 without --memory"),
        ("--max-lag-seconds 5", "--max-lag-seconds is 5.0 with a file, but means something only with a live source"),
        ("--reconnect-seconds 5", "(leave --reconnect-seconds out)"),
    ],
)
@pytest.mark.parametrize("name", ["ask", "watch"])
def test_what_means_nothing_beside_the_rest(
    name: str, line: str, told: str, film: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("statekv.engine.engine.load", _never)
    assert told in refused(name, film, *(COUNT,) * (name == "ask"), *line.split())


@pytest.mark.parametrize("name", ["analyze", "bench video"])
def test_other_commands_refuse_it_too(name: str, film: Path, tmp_path: Path) -> None:
    told = refused(*name.split(), film, "--method", "full", "--budget", "9")
    assert "--budget is 9 with carry 'all'" in told.replace("--carry", "carry")


@pytest.mark.parametrize(
    ("carry", "told"),
    [
        ("nosuch.module:X", "--carry is 'nosuch.module:X', but there is no module nosuch"),
        ("statekv.errors:StateKVError", "--carry is 'statekv.errors:StateKVError', which is no Policy"),
        ("accumulated(decay=2", "--carry is 'accumulated(decay=2', which cannot be read"),
    ],
)
def test_a_policy_that_is_not_there(carry: str, told: str, film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("statekv.engine.engine.load_model", _never)
    assert told in refused("ask", film, COUNT, "--carry", carry)


def test_a_seed_that_torch_cannot_take(film: Path) -> None:
    assert "seed" in refused("ask", film, COUNT, "--method", "random", "--budget", "9", "--seed", str(2**70))


def test_a_budget_that_the_pinned_prefix_fills(film: Path) -> None:
    line = refused("ask", film, COUNT, "--budget", "1", "--pin-prefix")
    assert "budget is 1, but the pinned prefix" in line


@pytest.mark.parametrize(
    "setting", [("--method", "streaming_llm"), ("--carry", "sink_recent"), ("--recall", "sink_recent")]
)
def test_sinks_that_fill_the_budget(film: Path, setting: tuple[str, str]) -> None:
    line = refused("ask", film, COUNT, *setting, "--budget", "8", "--sinks", "8")
    assert "--sinks is 8 with a --budget of 8" in line


@pytest.mark.parametrize(
    ("option", "known"),
    [("method", METHODS), *((setting.name, setting.kind.known) for setting in SETTINGS.values() if setting.kind.known)],
)
def test_names_that_nobody_knows(film: Path, option: str, known: tuple[str, ...]) -> None:
    line = refused("ask", film, COUNT, f"--{option.replace('_', '-')}", "nope")
    assert f"'nope' (known: {', '.join(known)}" in line
    assert all(name in line for name in known)


def test_settings_are_checked_before_the_model_is_loaded(film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("statekv.engine.engine.load", _never)
    refused("ask", film, COUNT, "--budget", "0")
    refused("ask", film, "")


@pytest.mark.parametrize("horizon", ["40", "112"])  # in the middle of the video; in the question
def test_a_stream_past_its_horizon(film: Path, horizon: str) -> None:
    line = refused("ask", film, COUNT, "--horizon", horizon)
    assert "as far as RoPE reaches for this stream" in line
    assert f"a --horizon above {horizon}" in line
    assert "set --on-horizon to 'compact'" in line


def test_code_that_is_not_trusted(film: Path) -> None:
    (name,) = (known.name for family in FAMILIES.values() if family.own_code for known in family.checkpoints[:1])
    assert "(set --trust-remote-code to trust it)" in refused("ask", film, COUNT, "--model", name)


def test_a_file_that_is_too_long_where_steps_may_not_move(film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("statekv.models.adapter.VideoModel.trained_length", 100)
    line = refused("ask", film, COUNT, "--on-horizon", "error")
    assert "12 frames need up to" in line
    assert "(lower --fps or --max-frames, set --on-horizon to 'compact', or accept the risk of --horizon " in line


def test_an_unknown_way_of_living_with_the_horizon(film: Path) -> None:
    line = refused("ask", film, COUNT, "--on-horizon", "wrap")
    assert "unknown --on-horizon 'wrap'" in line
    assert all(name in line for name in SETTINGS["on_horizon"].kind.known)


# Questions


def test_questions_that_are_not_there(film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("statekv.engine.engine.load", _never)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert "standard input holds no question" in refused("ask", film, "-")
    assert "cannot hold questions too (use --questions FILE)" in refused("ask", "-", "-")
    assert "cannot be read: no such file" in refused("ask", film, "--questions", tmp_path / "q.txt")
    (tmp_path / "q.txt").write_bytes(b"wie viele Gr\xfcne?\n")
    assert "q.txt is not UTF-8 text" in refused("ask", film, "--questions", tmp_path / "q.txt")


@pytest.mark.parametrize("question", ["", "  ", "\n"])
def test_a_question_without_words(film: Path, question: str) -> None:
    assert "question is empty" in refused("ask", film, COUNT, question)


@pytest.mark.parametrize("questions", [("<img>",), (COUNT, "what is <video>?")])
def test_a_question_with_a_vision_token(film: Path, questions: tuple[str, ...]) -> None:
    """Known before an hour of video goes in, and before any other answer goes out."""
    assert "special token" in refused("ask", film, *questions)


# Models


def test_a_model_that_is_not_there(film: Path, tmp_path: Path) -> None:
    for name in (str(tmp_path / "nowhere"), "nobody/nothing"):
        line = refused("ask", film, COUNT, "--model", name)
        assert repr(name) in line
        assert all(way_out in line for way_out in ("folder", "OpenGVLab/", "demo"))


def test_a_folder_without_a_model(film: Path, tmp_path: Path) -> None:
    assert str(tmp_path) in refused("ask", film, COUNT, "--model", tmp_path)


@pytest.mark.parametrize("model_type", ["llama", "qwen2_vl", "brand_new"])
def test_an_architecture_that_is_not_supported(film: Path, tmp_path: Path, model_type: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert model_type in (line := refused("ask", film, COUNT, "--model", tmp_path))
    assert model_type == "brand_new" or all(family in line for family in FAMILIES)


def _truncate_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])


def _garble_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"<html>404</html>" * 20)


def _remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _edit_weights(folder: Path, edit: Callable[[dict[str, Any], str], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors, next(name for name in sorted(tensors) if name.endswith("layers.0.self_attn.q_proj.weight")))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _drop_a_weight(folder: Path) -> None:
    _edit_weights(folder, lambda tensors, name: tensors.pop(name))


def _reshape_a_weight(folder: Path) -> None:
    _edit_weights(folder, lambda tensors, name: tensors.update({name: tensors[name][:7].clone()}))


def _garble_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _garble_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def _remove_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def _remove_processor(folder: Path) -> None:
    for path in folder.glob("*processor*"):
        path.unlink()


def _garble_processor(folder: Path) -> None:
    (folder / "video_preprocessor_config.json").write_text("[1")


@pytest.mark.parametrize(
    "damage",
    [
        _truncate_weights,
        _garble_weights,
        _remove_weights,
        _drop_a_weight,
        _reshape_a_weight,
        _garble_config,
        _garble_tokenizer,
        _remove_tokenizer,
        _remove_processor,
        _garble_processor,
    ],
)
def test_a_damaged_checkpoint(film: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder = Path(shutil.copytree(DEMO, tmp_path / "checkpoint"))
    damage(folder)
    refused("ask", film, COUNT, "--model", folder)


@pytest.mark.parametrize(
    "arguments", [("--dtype", "nope"), ("--dtype", "int8"), ("--device", "nope"), ("--device-map", "nope")]
)
def test_a_place_or_type_that_does_not_exist(film: Path, arguments: tuple[str, str]) -> None:
    line = refused("ask", film, COUNT, *arguments)
    assert arguments[1] in line
    assert "download" not in line  # nothing is wrong with the weights


def test_cuda_without_cuda(film: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert "cuda" in refused("ask", film, COUNT, "--device", "cuda").lower()


# Ctrl-C


def interrupt(*_: Any, **__: Any) -> NoReturn:
    raise KeyboardInterrupt


def _never(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("the model is loaded")


def test_an_interrupt_while_watching(film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, frames = FrameQueue.put, 0

    def put(queue: FrameQueue, frame: Frame, lent: bool = False) -> PendingStep | Progress | None:
        nonlocal frames
        if (frames := frames + 1) == 5:
            raise KeyboardInterrupt
        return original(queue, frame, lent)

    monkeypatch.setattr(FrameQueue, "put", put)
    assert complaint(command("ask", film, COUNT), 130) == "statekv: interrupted after 4 frames"


@pytest.mark.parametrize(
    "where",
    ["statekv.engine.engine.load", "statekv.engine.engine.Engine.open", "statekv.engine.session.Session.stream"],
)
def test_an_interrupt_anywhere_else(film: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.setattr(where, interrupt)
    complaint(command("ask", film, COUNT), 130)


def test_an_interrupted_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("statekv.evals.cards.compare.read_frames", interrupt)
    complaint(command("demo", "--videos", "1", "--frames", "20", "--folder", tmp_path), 130)


def test_an_interrupted_demo_leaves_no_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("statekv.evals.cards.compare.write_film", interrupt)
    complaint(command(*_demo(tmp_path / "d")), 130)
    assert not (tmp_path / "d").exists()


# The demo


@pytest.mark.parametrize("budget", ["0", "-5"])
def test_a_demo_without_budget(tmp_path: Path, budget: str) -> None:
    assert f"--budget is {budget}" in refused(*_demo(tmp_path / "d"), "--budget", budget)


def test_a_demo_with_less_budget_than_sinks(tmp_path: Path) -> None:
    assert "budget" in refused(*_demo(tmp_path / "d"), "--budget", "3")


def test_a_demo_into_a_folder_that_is_a_file(film: Path) -> None:
    assert "film.mp4" in refused(*_demo(film))
    assert film.stat().st_size > 0


def test_a_demo_into_a_folder_that_cannot_be_made() -> None:
    if not Path("/proc/self").exists():
        pytest.skip("no /proc")
    assert "/proc/nowhere" in refused(*_demo(Path("/proc/nowhere")))


def _demo(folder: Path) -> tuple[str | Path, ...]:
    return ("demo", "--videos", "1", "--frames", "20", "--folder", folder)


# Typer's own


@pytest.mark.parametrize(
    "arguments",
    [
        ("nope",),
        ("ask",),
        ("ask", "film.mp4"),
        ("ask", "film.mp4", COUNT, "--nope"),
        ("ask", "film.mp4", COUNT, "--budget", "many"),
        ("demo", "--videos", "0"),
        ("demo", "--frames", "3"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    found = command(*arguments)
    assert (found.code, found.out) == (2, "")
    assert found.err.startswith("Usage: statekv")
    assert "Traceback" not in found.err


# In its own process: what FFmpeg writes by itself included


def test_a_process_fails_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("not a video at all\n" * 50)
    found = forked.run("ask", tmp_path / "text.mp4", COUNT, "-q")
    complaint(Result(found.returncode, found.stdout, found.stderr))


def test_a_process_warns_in_one_line(film: Path, tmp_path: Path) -> None:
    data = film.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 6 // 10])
    found = forked.run("ask", tmp_path / "cut.mp4", COUNT, "-q")
    assert found.returncode == 0
    assert len(found.stdout.splitlines()) == len(found.stderr.splitlines()) == 1
