"""Weights and data are told whole or not before anything long starts."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from statekv.errors import ConfigError, ModelError
from statekv.evals.paper.check import check_data, check_room, check_weights, left
from statekv.evals.results import ResultFile, Shard, file_name
from statekv.models.families.internvl import InternVL
from statekv.video.file import read_frames
from tests.evals.data_sets import (
    ovo,
    videomme,
    write_lines,
    write_mlvu,
    write_ovo,
    write_videomme,
    write_videos,
)
from tests.evals.small import header, lines
from tests.tiny import tiny

# Weights


def test_a_checkpoint_of_a_family(tmp_path: Path) -> None:
    folder = tiny("qwen3_vl").save(tmp_path / "own")
    found = check_weights(str(folder))
    assert (found.name, found.family, found.known) == (str(tmp_path / "own"), "qwen3_vl", None)
    assert found.weights.parameters == sum(weight.numel() for weight in tiny("qwen3_vl").model.parameters())
    assert set(found.weights.elements) == {"float32"}
    assert check_weights("demo").name == "demo"


def test_one_of_the_papers_is_known_by_its_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = next(size for size in InternVL.sizes if size.name == "internvl3-8b")
    names = {"hidden": "hidden_size", "intermediate": "intermediate_size", "layers": "num_hidden_layers"}
    names |= {"heads": "num_attention_heads", "kv_heads": "num_key_value_heads"}
    text = {named: asdict(size)[ours] for ours, named in names.items()}
    values = {"model_type": "internvl", "text_config": text, "vision_config": {"depth": 1}}
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    found = check_weights(".")
    assert (found.name, found.known) == (str(tmp_path), "internvl3-8b")
    text["num_hidden_layers"] += 1
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    assert check_weights(".").known is None


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (None, "has no config.json"),
        ({"model_type": "llama"}, "architecture 'llama' are not supported"),
        ({}, "architecture 'None' are not supported"),
        ({"model_type": "internvl_chat"}, "InternVL's own layout .*-hf"),
        ({"model_type": "internvl"}, "has no text_config"),
    ],
)
def test_what_is_no_checkpoint_of_ours(config: dict | None, told: str, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError, match=told):
        check_weights(str(tmp_path))


def test_a_folder_of_weights_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere is not a folder of weights"):
        check_weights(str(tmp_path / "nowhere"))


# Data


@pytest.mark.parametrize(
    ("write", "name"), [(write_videomme, "videomme"), (write_mlvu, "mlvu"), (write_ovo, "ovo_realtime")]
)
def test_a_data_set_is_recognised_by_its_records(write: Callable[[Path], None], name: str, tmp_path: Path) -> None:
    write(tmp_path)
    seen: list[int] = []
    found = check_data(tmp_path, on_video=lambda: seen.append(1))
    assert (found.task.name, len(found.questions), len(seen)) == (name, 3, 2)
    assert (found.missing, found.faulty) == ([], {})
    first, second = found.clips
    assert (first.width, first.height) == (56, 40)
    assert second.frames == 11
    assert second.seconds == pytest.approx(11.0)
    for clip in found.clips:
        until = clip.video.until_seconds
        assert clip.frames == len(list(read_frames(clip.video.path, 1.0, 512, until_seconds=until)))
    assert found.longest == (second if name == "ovo_realtime" else first)
    assert len(check_data(tmp_path, most=1).clips) == 1


def test_videos_that_are_missing_or_damaged_are_counted(tmp_path: Path) -> None:
    write_videomme(tmp_path)
    records = [videomme(number, name) for number, name in enumerate(("a", "b", "c", "d"))]
    write_lines(tmp_path / "test.jsonl", [*records, "no JSON", videomme(0, "a")])
    (tmp_path / "d.mp4").write_text("no video", encoding="utf-8")
    found = check_data(tmp_path)
    assert [clip.video.id for clip in found.clips] == ["a", "b"]
    assert found.missing == [tmp_path / "c.mp4"]
    assert list(found.faulty) == ["test.jsonl line 5", "test.jsonl line 6", "d"]
    assert "is not a video" in found.faulty["d"]


def test_a_folder_that_is_none_of_the_three(tmp_path: Path) -> None:
    write_videos(tmp_path, "a.mp4")
    for records in ([], [{"question": "What?"}], [ovo(1, "a.mp4", 3.0)]):
        write_lines(tmp_path / "test.jsonl", records)
        with pytest.raises(ConfigError, match="records of none of videomme, mlvu, ovo_realtime"):
            check_data(tmp_path)
    with pytest.raises(ConfigError, match="nowhere is not a folder of data"):
        check_data(tmp_path / "nowhere")


def test_records_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "test.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"test\.json is not JSON"):
        check_data(tmp_path)


def test_a_folder_without_the_videos_of_its_records(tmp_path: Path) -> None:
    write_videomme(tmp_path)
    write_lines(tmp_path / "test.jsonl", [videomme(0, "c"), videomme(1, "d")])
    with pytest.raises(ConfigError, match=r"none of the videos of .* is there: 2 are missing, 0 cannot be used"):
        check_data(tmp_path)


def test_results_need_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(2**20) if place == tmp_path else None)
    check_room(tmp_path / "not" / "yet", questions=100, methods=4)
    with pytest.raises(ConfigError, match=r"results may take 2\.0 MiB in .*yet, but 1\.0 MiB are free"):
        check_room(tmp_path / "not" / "yet", questions=256, methods=4)


def test_what_is_left_is_what_some_method_has_not_done(tmp_path: Path) -> None:
    write_videomme(tmp_path)
    found, place = check_data(tmp_path), tmp_path / "out"

    def ids(part: Shard = Shard()) -> list[str]:  # noqa: B008
        return [clip.video.id for clip in left(found, place, ("full", "statekv-9"), part, "demo")]

    assert ids() == ["a", "b"]
    for name, videos in (("full", "ab"), ("statekv-9", "b")):
        file = ResultFile(place / "videomme" / file_name(name, Shard()), header())
        for done in videos:
            file.append(lines(done, [True]))
    assert ids() == ["a"]
    assert ids(Shard(1, 2)) == ["b"]
    with pytest.raises(ConfigError, match="is of demo, not of other"):
        left(found, place, ("full",), Shard(), "other")
