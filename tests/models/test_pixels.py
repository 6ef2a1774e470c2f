"""Pixels equal those of the stock video processors, bit for bit."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from statekv.errors import ModelError, VideoError
from statekv.models import checkpoint, pixels
from statekv.models.pixels import InternVLRecipe, Qwen3VLRecipe, patchify, qwen3_vl_size, resize_and_normalise
from tests import stock

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
INTERNVL: dict[str, Any] = {
    "video_processor_type": "InternVLVideoProcessor",
    "size": {"height": 448, "width": 448},
    "resample": 3,
    "do_center_crop": None,
    "do_pad": True,
    **IMAGENET,
}
QWEN: dict[str, Any] = {
    "video_processor_type": "Qwen3VLVideoProcessor",
    "size": {"longest_edge": 25165824, "shortest_edge": 4096},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
SIZES = [(448, 448), (240, 320), (721, 1283), (33, 47), (100, 900)]
# transformers 5.10 refuses a video of one frame or narrower than a token, and rounds odd frame counts
# differently.
NEWEST_RULE = Version(transformers.__version__) >= Version("5.15")


def frames(num_frames: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * width + num_frames)
    return torch.randint(0, 256, (num_frames, 3, height, width), generator=generator, dtype=torch.uint8)


def stock_pixels(family: str, values: dict[str, Any], video: torch.Tensor) -> Any:
    return stock.video_processor(family, values)(videos=[video], do_sample_frames=False, return_tensors="pt")


@pytest.mark.parametrize("resample", [2, 3])
@pytest.mark.parametrize("size", SIZES)
def test_internvl_equals_stock(size: tuple[int, int], resample: int) -> None:
    values = INTERNVL | {"resample": resample}
    video = frames(3, *size)
    recipe = InternVLRecipe.from_dict(values)
    ours = resize_and_normalise(video, recipe.height, recipe.width, recipe)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, stock_pixels("internvl", values, video)["pixel_values_videos"][0])


def test_frames_that_lie_channels_last_in_memory_give_the_same_pixels() -> None:
    video = frames(2, 240, 321)
    recipe = InternVLRecipe.from_dict(INTERNVL)
    lying = video.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(resize_and_normalise(lying, 448, 448, recipe), resize_and_normalise(video, 448, 448, recipe))
    one = resize_and_normalise(lying[1:], 448, 448, recipe)
    assert torch.equal(one, resize_and_normalise(video, 448, 448, recipe)[1:])


@pytest.mark.parametrize("num_frames", [2, 3, 4, 7])
@pytest.mark.parametrize("size", SIZES)
def test_qwen3_vl_equals_stock_one_temporal_patch_at_a_time(size: tuple[int, int], num_frames: int) -> None:
    video = frames(num_frames, *size)
    recipe = Qwen3VLRecipe.from_dict(QWEN)
    height, width = qwen3_vl_size(*size, num_frames, recipe)
    steps = [patchify(resize_and_normalise(pair, height, width, recipe), recipe) for pair in video.split(2)]
    theirs = stock_pixels("qwen3_vl", QWEN, video)
    assert torch.equal(torch.cat([flat for flat, _ in steps]), theirs["pixel_values_videos"])
    t, h, w = theirs["video_grid_thw"][0].tolist()
    assert [grid for _, grid in steps] == [(1, h, w)] * t


@pytest.mark.parametrize("longest_edge", [2**17, 2**19])
def test_qwen3_vl_shrinks_to_the_budget_of_the_whole_video(longest_edge: int) -> None:
    values = QWEN | {"size": {"longest_edge": longest_edge, "shortest_edge": 4096}}
    video = frames(11, 240, 320)
    recipe = Qwen3VLRecipe.from_dict(values)
    height, width = qwen3_vl_size(240, 320, 11, recipe)
    flat, grid = patchify(resize_and_normalise(video, height, width, recipe), recipe)
    theirs = stock_pixels("qwen3_vl", values, video)
    assert torch.equal(flat, theirs["pixel_values_videos"])
    assert list(grid) == theirs["video_grid_thw"][0].tolist()
    assert 12 * height * width <= longest_edge * 1.1


@pytest.mark.parametrize("cap", [False, True])
@pytest.mark.skipif(not NEWEST_RULE, reason="an older transformers has another rule")
def test_qwen3_vl_size_equals_stock_everywhere(cap: bool) -> None:
    values = QWEN | {"cap_pixels_per_frame": cap}
    recipe = Qwen3VLRecipe.from_dict(values)
    rule = stock.smart_resize()
    for num_frames in (2, 3, 5, 9, 13, 64, 101, 768):
        for height, width in [
            (10, 40),
            (31, 31),
            (240, 426),
            (480, 854),
            (1080, 1920),
            (2160, 3840),
            (64, 6400),
        ]:
            expected = rule(
                num_frames,
                height,
                width,
                temporal_factor=2,
                factor=32,
                min_pixels=4096,
                max_pixels=_capped(num_frames) if cap else 25165824,
            )
            assert qwen3_vl_size(height, width, num_frames, recipe) == expected


def _capped(num_frames: int) -> int:
    # By hand, as documented by the stock class.
    return max(min(768 * 32 * 32, 25165824 // num_frames), int(4096 * 1.05)) * num_frames


@pytest.mark.skipif(not NEWEST_RULE, reason="an older transformers knows no cap")
def test_qwen3_vl_with_the_cap_equals_stock() -> None:
    values = QWEN | {"cap_pixels_per_frame": True, "max_video_tokens": 64}
    recipe = Qwen3VLRecipe.from_dict(values)
    grid = stock_pixels("qwen3_vl", values, frames(4, 480, 640))["video_grid_thw"][0].tolist()
    height, width = qwen3_vl_size(480, 640, 4, recipe)
    assert grid == [2, height // 16, width // 16]
    assert height * width <= 64 * 32 * 32


def test_qwen3_vl_single_frame_counts_as_its_padded_pair() -> None:
    recipe = Qwen3VLRecipe.from_dict(QWEN)
    assert qwen3_vl_size(240, 320, 1, recipe) == qwen3_vl_size(240, 320, 2, recipe)
    flat, grid = patchify(torch.arange(3.0).view(1, 3, 1, 1).expand(1, 3, 32, 32), recipe)
    assert grid == (1, 2, 2)
    assert flat.shape == (4, 3 * 2 * 16 * 16)


def test_qwen3_vl_refuses_a_ribbon() -> None:
    with pytest.raises(VideoError, match="200 times"):
        qwen3_vl_size(64, 64 * 201, 4, Qwen3VLRecipe.from_dict(QWEN))


@pytest.mark.parametrize(("family", "recipe"), [("internvl", InternVLRecipe), ("qwen3_vl", Qwen3VLRecipe)])
def test_missing_and_null_keys_take_the_stock_defaults(family: str, recipe: Any) -> None:
    defaults = stock.video_processor(family, {})
    ours = recipe.from_dict({"size": None, "resample": None, "image_mean": None})
    assert ours == recipe()
    assert (ours.mean, ours.std) == (tuple(defaults.image_mean), tuple(defaults.image_std))
    assert (ours.rescale_factor, ours.resample) == (defaults.rescale_factor, int(defaults.resample))
    assert all(getattr(ours, key) == value for key, value in dict(defaults.size).items())
    assert not getattr(defaults, "do_center_crop", None)
    if family == "qwen3_vl":
        for name in ("patch_size", "temporal_patch_size", "merge_size"):
            assert getattr(ours, name) == getattr(defaults, name)
        assert ours.cap_pixels_per_frame == bool(getattr(defaults, "cap_pixels_per_frame", None))
        assert ours.max_video_tokens == getattr(defaults, "max_video_tokens", 768)


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


def test_frames_that_were_scaled_already_are_refused() -> None:
    with pytest.raises(ModelError, match="uint8"):
        resize_and_normalise(torch.rand(1, 3, 8, 8), 8, 8, InternVLRecipe())


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_the_float_path_of_other_processors_equals_torchvisions(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    functional = stock.tv_functional()
    monkeypatch.setattr(functional._geometry, "_do_native_uint8_resize_on_cpu", lambda _: False)
    video = frames(2, 101, 77)
    expected = functional.resize(video, [64, 128], interpolation=functional.InterpolationMode(mode), antialias=True)
    assert torch.equal(pixels._resize_as_floats(video, 64, 128, mode), expected)


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
