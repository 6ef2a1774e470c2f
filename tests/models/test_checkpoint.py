"""The text files of a checkpoint folder, in the order of the stock classes, and whether its weights are whole."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from statekv.errors import ModelError
from statekv.models.checkpoint import (
    Weights,
    look_at_weights,
    read_checkpoint_file,
    read_checkpoint_json,
    read_processor_config,
    why_hub_is_away,
)


def put(folder: Path, **files: object) -> str:
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")
    return str(folder)


def test_a_nested_video_processor_comes_first(tmp_path: Path) -> None:
    folder = put(
        tmp_path,
        processor_config={"video_processor": {"from": "nested"}},
        video_preprocessor_config={"from": "own"},
        preprocessor_config={"from": "images"},
    )
    assert read_processor_config(folder) == {"from": "nested"}


def test_then_the_video_processors_own_file_then_the_images(tmp_path: Path) -> None:
    folder = put(tmp_path, processor_config={"x": 1}, preprocessor_config={"from": "images"})
    assert read_processor_config(folder) == {"from": "images"}
    put(tmp_path, video_preprocessor_config={"from": "own"})
    assert read_processor_config(folder) == {"from": "own"}


def test_none_of_them_is_told_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"preprocessor_config\.json") as told:
        read_processor_config(str(tmp_path))
    assert "-hf" in told.value.hint


@pytest.mark.parametrize("text", ["{broken", "", "3", "null", "[1, 2]", "[]", '"text"'])
def test_what_is_no_json_object_is_told_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=r"preprocessor_config\.json.*no JSON object"):
        read_processor_config(str(tmp_path))


def test_missing_files_are_none_and_texts_are_utf8(tmp_path: Path) -> None:
    assert read_checkpoint_json(str(tmp_path), "a.json") is None
    assert read_checkpoint_file(str(tmp_path), "a.jinja") is None
    (tmp_path / "a.jinja").write_text("视频", encoding="utf-8")
    assert read_checkpoint_file(str(tmp_path), "a.jinja") == "视频"


def test_a_folder_that_is_not_there_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as told:
        read_processor_config(str(tmp_path / "nothing"), local_files_only=True)
    assert "\n" not in str(told.value)


class _Refusing(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_error(403)

    def log_message(self, *_: object) -> None:
        """Be silent."""


@pytest.mark.parametrize(
    ("serving", "told"), [("answers", ""), ("is silent", "timed out"), ("is gone", "Connection refused")]
)
def test_whether_the_hub_can_be_asked(serving: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within seconds, whatever is wrong; who refuses is there."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("statekv.models.checkpoint._PATIENCE_SECONDS", 20 if serving == "answers" else 0.1)
    monkeypatch.setenv("NO_PROXY", "*")
    with HTTPServer(("127.0.0.1", 0), _Refusing) as server:
        place = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", place)
        if serving == "answers":
            threading.Thread(target=server.handle_request, daemon=True).start()
        if serving == "is gone":
            server.server_close()
        found = why_hub_is_away()
    assert found == (f"cannot reach the hub at {place}: {told}" if told else "")


def test_offline_by_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert why_hub_is_away() == "HF_HUB_OFFLINE is set"


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def in_two(tmp_path: Path) -> Path:
    """Weights in two files with an index."""
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, tmp_path / ONE)
    save_file({"c": torch.zeros(5, dtype=torch.bfloat16)}, tmp_path / TWO)
    index = {"weight_map": {"a": ONE, "b": ONE, "c": TWO}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return tmp_path


def test_weights_are_told_by_their_headers(in_two: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    found = look_at_weights(in_two)
    assert found == Weights(2, {"float32": 6, "bfloat16": 9})
    assert found.parameters == 15
    alone = tmp_path_factory.mktemp("alone")
    save_file({"a": torch.zeros(2, 3, dtype=torch.float16)}, alone / "model.safetensors")
    assert look_at_weights(alone) == Weights(1, {"float16": 6})


def test_weights_that_are_not_whole_are_told(in_two: Path) -> None:
    whole = (in_two / TWO).read_bytes()
    cases = {
        whole[:-3]: r"model-00002-of-00002\.safetensors is cut off",
        b"": r"model-00002-of-00002\.safetensors is cut off",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n": "is a pointer of git-lfs",
        (in_two / ONE).read_bytes(): "lack 1 tensors, such as c",
    }
    for data, told in cases.items():
        (in_two / TWO).write_bytes(data)
        with pytest.raises(ModelError, match=told):
            look_at_weights(in_two)
    (in_two / TWO).unlink()
    with pytest.raises(ModelError, match=f"lacks 1 of 2 files of weights, such as {TWO}"):
        look_at_weights(in_two)


def test_no_weights_at_all(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"lacks 1 of 1 files of weights, such as model\.safetensors"):
        look_at_weights(tmp_path)
