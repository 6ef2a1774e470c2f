"""Pixels equal those of the stock video processors, bit for bit."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import pytest
import torch

from statekv.errors import ModelError
from statekv.models import checkpoint, preprocess
from statekv.models.families.eagle2_5 import Eagle25Recipe
from statekv.models.families.internvl import InternVLRecipe
from statekv.models.families.llava_onevision import LlavaOnevisionRecipe
from statekv.models.preprocess import resize_and_normalise
from tests import stock
from tests.models.families import eagle_processor

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
INTERNVL: dict[str, Any] = {
    "video_processor_type": "InternVLVideoProcessor",
    "size": {"height": 448, "width": 448},
    "resample": 3,
    "do_center_crop": None,
    "do_pad": True,
    **IMAGENET,
}
SIZES = [(448, 448), (240, 320), (721, 1283), (33, 47), (100, 900)]


def frames(num_frames: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * width + num_frames)
    return torch.randint(0, 256, (num_frames, 3, height, width), generator=generator, dtype=torch.uint8)


def stock_pixels(values: dict[str, Any], video: torch.Tensor) -> Any:
    return stock.video_processor("internvl", values)(videos=[video], do_sample_frames=False, return_tensors="pt")


@pytest.mark.parametrize("resample", [2, 3])
@pytest.mark.parametrize("size", SIZES)
def test_internvl_equals_stock(size: tuple[int, int], resample: int) -> None:
    values = INTERNVL | {"resample": resample}
    video = frames(3, *size)
    recipe = InternVLRecipe.from_dict(values)
    ours = resize_and_normalise(video, recipe.height, recipe.width, recipe)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, stock_pixels(values, video)["pixel_values_videos"][0])


def test_frames_that_lie_channels_last_in_memory_give_the_same_pixels() -> None:
    video = frames(2, 240, 321)
    recipe = InternVLRecipe.from_dict(INTERNVL)
    lying = video.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(resize_and_normalise(lying, 448, 448, recipe), resize_and_normalise(video, 448, 448, recipe))
    one = resize_and_normalise(lying[1:], 448, 448, recipe)
    assert torch.equal(one, resize_and_normalise(video, 448, 448, recipe)[1:])


def test_llava_onevision_equals_stock() -> None:
    values = {"video_processor_type": "LlavaOnevisionVideoProcessor", "size": {"height": 384, "width": 384}}
    video = frames(3, 240, 321)
    recipe = LlavaOnevisionRecipe.from_dict(values)
    ours = resize_and_normalise(video, recipe.height, recipe.width, recipe)
    theirs = stock.video_processor("llava_onevision", values)(
        videos=[video], do_sample_frames=False, return_tensors="pt"
    )
    assert torch.equal(ours, theirs["pixel_values_videos"][0])


@pytest.mark.parametrize(
    ("family", "recipe"), [("internvl", InternVLRecipe), ("llava_onevision", LlavaOnevisionRecipe)]
)
def test_missing_and_null_keys_take_the_stock_defaults(family: str, recipe: Any) -> None:
    defaults = stock.video_processor(family, {})
    ours = recipe.from_dict({"size": None, "resample": None, "image_mean": None})
    assert ours == recipe()
    assert (ours.mean, ours.std) == (tuple(defaults.image_mean), tuple(defaults.image_std))
    assert (ours.rescale_factor, ours.resample) == (defaults.rescale_factor, int(defaults.resample))
    assert {"height": ours.height, "width": ours.width} == dict(defaults.size)
    assert not getattr(defaults, "do_center_crop", None)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"do_center_crop": True}, "do_center_crop=True"),
        ({"do_resize": False}, "do_resize=False"),
        ({"do_normalize": False}, "do_normalize=False"),
        ({"resample": 1}, "resample=1"),
        ({"size": {"shortest_edge": 448}}, "height and width"),
        ({"video_processor_type": "LlavaOnevisionVideoProcessor"}, "LlavaOnevisionVideoProcessor"),
    ],
)
def test_what_is_not_reproduced_is_refused(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ModelError, match=told) as caught:
        InternVLRecipe.from_dict(INTERNVL | wrong)
    assert caught.value.hint


def test_eagle_frames_are_square_tiles_of_the_size_that_its_file_says() -> None:
    values = eagle_processor.JSON_FILES["preprocessor_config.json"]
    assert Eagle25Recipe.from_dict(values) == Eagle25Recipe(height=32, width=32)
    assert (Eagle25Recipe().height, Eagle25Recipe().width) == (448, 448)
    side = {"height": 448, "width": 448}
    assert Eagle25Recipe.from_dict({"size": side, "crop_size": side}) == Eagle25Recipe()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"pad_during_tiling": True}, "pad_during_tiling=True"),
        ({"min_dynamic_tiles": 2}, "min_dynamic_tiles=2"),
        ({"size": {"height": 32, "width": 64}}, "size="),
        ({"crop_size": {"height": 16, "width": 16}}, "crop_size="),
        ({"do_center_crop": True}, "do_center_crop=True"),
        ({"image_processor_type": "SiglipImageProcessor"}, "SiglipImageProcessor"),
    ],
)
def test_what_is_not_reproduced_of_eagles_tiles_is_refused(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ModelError, match=told) as caught:
        Eagle25Recipe.from_dict(eagle_processor.JSON_FILES["preprocessor_config.json"] | wrong)
    assert caught.value.hint


def test_frames_that_were_scaled_already_are_refused() -> None:
    with pytest.raises(ModelError, match="uint8"):
        resize_and_normalise(torch.rand(1, 3, 8, 8), 8, 8, InternVLRecipe())


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_the_float_path_of_other_processors_equals_torchvisions(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    functional = stock.tv_functional()
    monkeypatch.setattr(functional._geometry, "_do_native_uint8_resize_on_cpu", lambda _: False)
    video = frames(2, 101, 77)
    expected = functional.resize(video, [64, 128], interpolation=functional.InterpolationMode(mode), antialias=True)
    assert torch.equal(preprocess._resize_as_floats(video, 64, 128, mode), expected)


def test_bilinear_on_a_processor_without_integer_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    test_internvl_equals_stock((100, 900), 2)


def test_the_json_is_found_in_stock_order(tmp_path: Path) -> None:
    def write(name: str, values: dict[str, Any]) -> None:
        (tmp_path / name).write_text(json.dumps(values), encoding="utf-8")

    with pytest.raises(ModelError, match="no processor_config"):
        checkpoint.read_processor_config(str(tmp_path))
    files: list[tuple[str, dict[str, Any]]] = [
        ("preprocessor_config.json", {"resample": 1}),
        ("video_preprocessor_config.json", {"resample": 2}),
        ("processor_config.json", {"video_processor": {"resample": 3}}),
    ]
    for name, values in files:
        write(name, values)
        expected = values.get("video_processor", values)
        assert checkpoint.read_processor_config(str(tmp_path)) == expected
    write("processor_config.json", {"image_seq_length": 256})
    assert checkpoint.read_processor_config(str(tmp_path)) == {"resample": 2}
    (tmp_path / "video_preprocessor_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="no JSON object"):
        checkpoint.read_processor_config(str(tmp_path))


def test_an_unknown_checkpoint_is_refused() -> None:
    with pytest.raises(ModelError, match="no/such-checkpoint"):
        checkpoint.read_processor_config("no/such-checkpoint", local_files_only=True)


def test_a_hub_failure_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("we could not connect\nto the hub")

    monkeypatch.setattr(checkpoint, "cached_file", fail)
    with pytest.raises(ModelError, match="cannot read some/model: we could not connect") as caught:
        checkpoint.read_processor_config("some/model")
    assert "\n" not in str(caught.value)
