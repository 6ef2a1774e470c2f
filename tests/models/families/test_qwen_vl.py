"""How the Qwen families size frames and cut them into patches equals the stock video processors, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from statekv.errors import ModelError, VideoError
from statekv.models.families.qwen2_5_vl import Qwen25VLRecipe, qwen2_5_vl_size
from statekv.models.families.qwen3_vl import Qwen3VLRecipe, qwen3_vl_size
from statekv.models.families.qwen_vl import patchify
from statekv.models.preprocess import resize_and_normalise
from tests import stock

QWEN: dict[str, Any] = {
    "video_processor_type": "Qwen3VLVideoProcessor",
    "size": {"longest_edge": 25165824, "shortest_edge": 4096},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
# Qwen2.5-VL's checkpoints have no file for videos; the bounds of an image are those of a frame.
QWEN25: dict[str, Any] = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
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
    rule = stock.smart_resize("qwen3_vl")
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


@pytest.mark.parametrize("num_frames", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [*SIZES, (10, 40)])
def test_qwen2_5_vl_equals_stock_one_temporal_patch_at_a_time(size: tuple[int, int], num_frames: int) -> None:
    video = frames(num_frames, *size)
    recipe = Qwen25VLRecipe.from_dict(QWEN25)
    height, width = qwen2_5_vl_size(*size, num_frames, recipe)
    steps = [patchify(resize_and_normalise(pair, height, width, recipe), recipe) for pair in video.split(2)]
    theirs = stock_pixels("qwen2_5_vl", QWEN25, video)
    assert torch.equal(torch.cat([flat for flat, _ in steps]), theirs["pixel_values_videos"])
    t, h, w = theirs["video_grid_thw"][0].tolist()
    assert [grid for _, grid in steps] == [(1, h, w)] * t


@pytest.mark.parametrize(("smallest", "largest"), [(3136, 12845056), (128 * 28 * 28, 28 * 28 * 768)])
def test_qwen2_5_vl_size_equals_stock_everywhere(smallest: int, largest: int) -> None:
    recipe = Qwen25VLRecipe.from_dict(QWEN25 | {"min_pixels": smallest, "max_pixels": largest})
    rule = stock.smart_resize("qwen2_5_vl")
    for height, width in [(10, 40), (31, 31), (240, 426), (480, 854), (1080, 1920), (2160, 3840), (64, 6400)]:
        expected = rule(height, width, factor=28, min_pixels=smallest, max_pixels=largest)
        for num_frames in (1, 2, 768, 10**6):
            assert qwen2_5_vl_size(height, width, num_frames, recipe) == expected


@pytest.mark.skipif(not NEWEST_RULE, reason="an older transformers knows no cap")
def test_qwen2_5_vl_with_the_cap_equals_stock() -> None:
    values = QWEN25 | {"cap_pixels_per_frame": True, "max_video_tokens": 256}
    grid = stock_pixels("qwen2_5_vl", values, frames(8, 480, 640))["video_grid_thw"][0].tolist()
    height, width = qwen2_5_vl_size(480, 640, 8, Qwen25VLRecipe.from_dict(values))
    assert grid == [4, height // 14, width // 14]
    assert height * width <= 256 * 28 * 28 // 4


def test_qwen2_5_vl_reads_the_bounds_by_either_name() -> None:
    sizes = {"size": {"shortest_edge": 5000, "longest_edge": 60000}}
    named = {"min_pixels": 5000, "max_pixels": 60000}
    assert Qwen25VLRecipe.from_dict(sizes) == Qwen25VLRecipe.from_dict(named)
    assert Qwen25VLRecipe.from_dict({**sizes, "max_pixels": 70000}).longest_edge == 70000
    with pytest.raises(ModelError, match="shortest_edge and longest_edge"):
        Qwen25VLRecipe.from_dict({"size": {"height": 5, "width": 5}})


@pytest.mark.parametrize(("family", "recipe"), [("qwen3_vl", Qwen3VLRecipe), ("qwen2_5_vl", Qwen25VLRecipe)])
def test_missing_and_null_keys_take_the_stock_defaults(family: str, recipe: Any) -> None:
    defaults = stock.video_processor(family, {})
    ours = recipe.from_dict({"size": None, "resample": None, "image_mean": None})
    assert ours == recipe()
    assert (ours.mean, ours.std) == (tuple(defaults.image_mean), tuple(defaults.image_std))
    assert (ours.rescale_factor, ours.resample) == (defaults.rescale_factor, int(defaults.resample))
    if NEWEST_RULE or family == "qwen3_vl":  # Qwen2.5-VL's checkpoints all say theirs
        assert all(getattr(ours, key) == value for key, value in dict(defaults.size).items())
    assert not getattr(defaults, "do_center_crop", None)
    for name in ("patch_size", "temporal_patch_size", "merge_size"):
        assert getattr(ours, name) == getattr(defaults, name)
    assert ours.cap_pixels_per_frame == bool(getattr(defaults, "cap_pixels_per_frame", None))
    assert ours.max_video_tokens == getattr(defaults, "max_video_tokens", recipe().max_video_tokens)
