"""Frames to pixels, bit for bit as the stock video processors, without torchvision.

The stock classes (transformers >= 5.10: `InternVLVideoProcessor`, `Qwen3VLVideoProcessor`) need torchvision,
whose compiled half does not load beside a torch of another build. What they compute is small: torchvision's
antialiased resize of uint8 frames and one fused rescale-and-normalise. Both are plain torch here.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from statekv.errors import ModelError, VideoError

# PIL's numbers, as the JSON files hold them. Stock's Lanczos depends on the version of torchvision: left out.
_RESAMPLE = {2: "bilinear", 3: "bicubic"}
_STEPS_ALWAYS_DONE = ("do_resize", "do_rescale", "do_normalize")


@dataclass(frozen=True)
class PixelRecipe:
    """What every video processor JSON says: resize, then `(pixel * rescale_factor - mean) / std`."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale_factor: float = 1 / 255
    resample: int = 3


@dataclass(frozen=True)
class InternVLRecipe(PixelRecipe):
    """InternVL: every frame to one size, in pixels. Defaults are those of `InternVLVideoProcessor`."""

    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    height: int = 384
    width: int = 384

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> InternVLRecipe:
        """Read the JSON of an InternVL checkpoint; missing and null keys take the stock class's defaults.

        Raises:
            ModelError: the JSON belongs to another class, or asks for something that is not reproduced here.
        """
        size = _size(values, {"height": cls.height, "width": cls.width})
        return cls(**_common(values, "InternVLVideoProcessor", cls()), height=size[0], width=size[1])


@dataclass(frozen=True)
class Qwen3VLRecipe(PixelRecipe):
    """Qwen3-VL: the size follows from a budget for the video. Defaults are those of `Qwen3VLVideoProcessor`.

    `shortest_edge` and `longest_edge` bound frames x height x width of the whole video, despite their names.
    """

    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    shortest_edge: int = 128 * 32 * 32
    longest_edge: int = 32 * 32 * 768
    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2
    cap_pixels_per_frame: bool = False
    max_video_tokens: int = 768

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Qwen3VLRecipe:
        """Read the JSON of a Qwen3-VL checkpoint; missing and null keys take the stock class's defaults.

        Raises:
            ModelError: the JSON belongs to another class, or asks for something that is not reproduced here.
        """
        size = _size(values, {"shortest_edge": cls.shortest_edge, "longest_edge": cls.longest_edge})
        names = (
            "patch_size",
            "temporal_patch_size",
            "merge_size",
            "cap_pixels_per_frame",
            "max_video_tokens",
        )
        own = {name: _value(values, name, getattr(cls, name)) for name in names}
        common = _common(values, "Qwen3VLVideoProcessor", cls())
        return cls(**common, shortest_edge=size[0], longest_edge=size[1], **own)


def _value(values: Mapping[str, Any], key: str, default: Any) -> Any:
    # The stock classes treat a null in the JSON as a missing key.
    value = values.get(key)
    return default if value is None else value


def _size(values: Mapping[str, Any], defaults: dict[str, int]) -> list[int]:
    size = _value(values, "size", defaults)
    items = size.items() if isinstance(size, Mapping) else ()
    given = {key: value for key, value in items if value is not None}
    if given.keys() != defaults.keys():
        rule = f"the video processor's size is {size!r}, it must have {' and '.join(defaults)}"
        raise ModelError(rule, "use the JSON files of the original checkpoint")
    return [given[key] for key in defaults]


def _common(values: Mapping[str, Any], stock_class: str, default: PixelRecipe) -> dict[str, Any]:
    found = _value(values, "video_processor_type", stock_class)
    if found != stock_class:
        rule = f"the checkpoint's video processor is {found}, not {stock_class}"
        raise ModelError(rule, "load a checkpoint of this family")
    wrong = {key: False for key in _STEPS_ALWAYS_DONE if not _value(values, key, True)}
    if _value(values, "do_center_crop", False):
        wrong["do_center_crop"] = True
    resample = _value(values, "resample", default.resample)
    if resample not in _RESAMPLE:
        wrong["resample"] = resample
    if wrong:
        told = ", ".join(f"{key}={value}" for key, value in wrong.items())
        rule = f"the video processor asks for {told}, which is not reproduced"
        raise ModelError(rule, "resize, rescale and normalise must be on, cropping off, resample 2 or 3")
    return {
        "mean": tuple(_value(values, "image_mean", default.mean)),
        "std": tuple(_value(values, "image_std", default.std)),
        "rescale_factor": _value(values, "rescale_factor", default.rescale_factor),
        "resample": resample,
    }


def resize_and_normalise(frames: torch.Tensor, height: int, width: int, recipe: PixelRecipe) -> torch.Tensor:
    """Bring frames to a size and to the numbers that the vision tower was trained on.

    Frames do not see each other: any split of a video into calls gives the same bits.

    Args:
        frames: uint8 [N, 3, H, W], RGB.
        height, width: the size wanted, in pixels.
        recipe: how to resample and normalise.

    Returns:
        float32 [N, 3, height, width].

    Raises:
        ModelError: frames of another dtype or shape.
    """
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[1] != 3:
        found = f"frames are {frames.dtype} {list(frames.shape)}, they must be uint8 [N, 3, H, W]"
        raise ModelError(found, "pass RGB frames as decoded, before any scaling")
    pixels = _resize(frames, height, width, _RESAMPLE[recipe.resample]).to(torch.float32)
    # Stock folds the rescaling into mean and std, which rounds differently from scaling first.
    mean = torch.tensor(recipe.mean, device=frames.device) * (1.0 / recipe.rescale_factor)
    std = torch.tensor(recipe.std, device=frames.device) * (1.0 / recipe.rescale_factor)
    return pixels.sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))


def _resize(frames: torch.Tensor, height: int, width: int, mode: str) -> torch.Tensor:
    if frames.shape[-2:] == (height, width):
        return frames
    on_integers = frames.device.type == "cpu" and (mode == "bicubic" or _has_integer_bilinear())
    resize = _interpolate if on_integers else _resize_as_floats
    return resize(frames, height, width, mode)


def _resize_as_floats(frames: torch.Tensor, height: int, width: int, mode: str) -> torch.Tensor:
    # Where torch has no kernel on integers: on other devices, and for bilinear on CPUs without vector units.
    resized = _interpolate(frames.to(torch.float32), height, width, mode)
    return resized.clamp_(0, 255).round_().to(torch.uint8)


def _interpolate(frames: torch.Tensor, height: int, width: int, mode: str) -> torch.Tensor:
    return torch.nn.functional.interpolate(frames, size=(height, width), mode=mode, align_corners=False, antialias=True)


def _has_integer_bilinear() -> bool:
    # torchvision's own rule for when uint8 frames are resized as they are.
    fast = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return fast or platform.machine() in ("aarch64", "arm64")


def qwen3_vl_size(height: int, width: int, num_frames: int, recipe: Qwen3VLRecipe) -> tuple[int, int]:
    """The size to which Qwen3-VL resizes the frames of a video: `smart_resize` of transformers 5.23.

    The budget is for the whole video, so the number of frames has to be known (or chosen) before the first
    one. Stock refuses a video of a single frame; here it counts as the full temporal patch that it is padded
    to. transformers before 5.15 rounds odd counts up to the temporal patch where later ones round half to
    even: the two differ only when `num_frames % 4 == 1` and the budget lies between both roundings.

    Args:
        height, width: of the frames as decoded, in pixels.
        num_frames: of the whole video.

    Returns:
        (height, width) in pixels, multiples of patch_size * merge_size.

    Raises:
        VideoError: one side is more than 200 times the other.
    """
    factor = recipe.patch_size * recipe.merge_size
    num_frames = max(num_frames, recipe.temporal_patch_size)
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) / min(height, width) > 200:
        found = f"frames are {width}x{height} pixels, one side may be at most 200 times the other"
        raise VideoError(found, "crop the video first")
    smallest, largest = recipe.shortest_edge, _pixel_budget(num_frames, recipe)
    rounded_h, rounded_w = round(height / factor) * factor, round(width / factor) * factor
    rounded_t = round(num_frames / recipe.temporal_patch_size) * recipe.temporal_patch_size
    volume = rounded_t * rounded_h * rounded_w
    if volume > largest:
        shrink = math.sqrt(num_frames * height * width / largest)
        rounded_h = max(factor, math.floor(height / shrink / factor) * factor)
        rounded_w = max(factor, math.floor(width / shrink / factor) * factor)
    elif volume < smallest:
        grow = math.sqrt(smallest / (num_frames * height * width))
        rounded_h = math.ceil(height * grow / factor) * factor
        rounded_w = math.ceil(width * grow / factor) * factor
    return rounded_h, rounded_w


def _pixel_budget(num_frames: int, recipe: Qwen3VLRecipe) -> int:
    if not recipe.cap_pixels_per_frame:
        return recipe.longest_edge
    ceiling = recipe.max_video_tokens * (recipe.patch_size * recipe.merge_size) ** 2
    share = min(ceiling, recipe.longest_edge // num_frames)
    return max(share, int(recipe.shortest_edge * 1.05)) * num_frames


def patchify(pixels: torch.Tensor, recipe: Qwen3VLRecipe) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """Cut frames into Qwen3-VL's flat patches; the last frame is repeated to fill a temporal patch.

    Args:
        pixels: float32 [N, 3, H, W], height and width multiples of patch_size * merge_size.

    Returns:
        float32 [t * h * w, 3 * temporal_patch_size * patch_size ** 2] and the grid (t, h, w), in patches. The
        patches of a merge_size x merge_size block follow each other, as one token is made of them.
    """
    patch, merge, temporal = recipe.patch_size, recipe.merge_size, recipe.temporal_patch_size
    missing = -pixels.shape[0] % temporal
    if missing:
        pixels = torch.cat((pixels, pixels[-1:].expand(missing, -1, -1, -1)))
    frames, channels, height, width = pixels.shape
    t, h, w = frames // temporal, height // patch, width // patch
    cut = pixels.reshape(t, temporal, channels, h // merge, merge, patch, w // merge, merge, patch)
    flat = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, channels * temporal * patch * patch)
    return flat, (t, h, w)
