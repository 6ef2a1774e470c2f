"""Frames to pixels, bit for bit as the stock video processors, without torchvision.

The stock classes (transformers >= 5.10: `InternVLVideoProcessor` and its like) need torchvision, whose compiled half
does not load beside a torch of another build. What they compute is small: torchvision's antialiased resize of uint8
frames and one fused rescale-and-normalise. Both are plain torch here; what size frames get, and what is cut out of
them, is each family's own.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from statekv.errors import ModelError

# PIL's numbers, as the JSON files hold them. Stock's Lanczos depends on the version of torchvision: left out.
_RESAMPLE = {2: "bilinear", 3: "bicubic"}
_STEPS_ALWAYS_DONE = ("do_resize", "do_rescale", "do_normalize")
_SWITCHES = (*_STEPS_ALWAYS_DONE, "do_center_crop")


@dataclass(frozen=True)
class PixelRecipe:
    """What every video processor JSON says: resize, then `(pixel * rescale_factor - mean) / std`."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale_factor: float = 1 / 255
    resample: int = 3


def value_of(values: Mapping[str, Any], key: str, default: Any) -> Any:
    """What a processor's JSON says; the stock classes treat a null in it as a missing key."""
    value = values.get(key)
    return default if value is None else value


def size_of(values: Mapping[str, Any], defaults: dict[str, int]) -> list[int]:
    """The `size` of a processor's JSON, in the order of `defaults`; a ModelError where it has other keys."""
    size = value_of(values, "size", defaults)
    items = size.items() if isinstance(size, Mapping) else ()
    given = {key: value for key, value in items if value is not None}
    if given.keys() != defaults.keys():
        rule = f"the video processor's size is {size!r}, it must have {' and '.join(defaults)}"
        raise ModelError(rule, "use the JSON files of the original checkpoint")
    return [count_of(given, key, 0) for key in defaults]


def common_of(values: Mapping[str, Any], stock_class: str, default: PixelRecipe) -> dict[str, Any]:
    """The fields of `PixelRecipe` as a processor's JSON says them.

    Raises:
        ModelError: the JSON belongs to another class, or asks for something that is not reproduced here.
    """
    found = value_of(values, "video_processor_type", stock_class)
    if found != stock_class:
        rule = f"the checkpoint's video processor is {found}, not {stock_class}"
        raise ModelError(rule, "load a checkpoint of this family")
    for key in _SWITCHES:
        switch_of(values, key)
    wrong = {key: False for key in _STEPS_ALWAYS_DONE if not value_of(values, key, True)}
    if value_of(values, "do_center_crop", False):
        wrong["do_center_crop"] = True
    resample = value_of(values, "resample", default.resample)
    if type(resample) is not int or resample not in _RESAMPLE:
        wrong["resample"] = resample
    if wrong:
        told = ", ".join(f"{key}={value}" for key, value in wrong.items())
        rule = f"the video processor asks for {told}, which is not reproduced"
        raise ModelError(rule, "resize, rescale and normalise must be on, cropping off, resample 2 or 3")
    return {
        "mean": _of_colors(values, "image_mean", default.mean),
        "std": _of_colors(values, "image_std", default.std, above=0.0),
        "rescale_factor": _number("rescale_factor", value_of(values, "rescale_factor", default.rescale_factor), 0.0),
        "resample": resample,
    }


def _of_colors(values: Mapping[str, Any], key: str, default: tuple[float, ...], above: float = -math.inf) -> Any:
    found = value_of(values, key, default)
    if not isinstance(found, (list, tuple)) or len(found) != 3:
        raise _wrong(key, found, "three numbers")
    return tuple(_number(key, each, above) for each in found)


def _number(key: str, value: Any, above: float) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not above < value < math.inf:
        raise _wrong(key, value, "a number" if above else "a number above 0")
    return value


def count_of(values: Mapping[str, Any], key: str, default: int, most: int = 2**31) -> int:
    """A whole number from 1 on.

    Raises:
        ModelError: it is something else.
    """
    found = value_of(values, key, default)
    if type(found) is not int or not 1 <= found <= most:
        raise _wrong(key, found, f"a whole number from 1 to {most}")
    return found


def switch_of(values: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """True or false.

    Raises:
        ModelError: it is something else.
    """
    found = value_of(values, key, default)
    if not isinstance(found, bool):
        raise _wrong(key, found, "true or false")
    return found


def _wrong(key: str, value: Any, rule: str) -> ModelError:
    told = f"the video processor's {key} is {str(value)[:80]}, but must be {rule}"
    return ModelError(told, "use the JSON files of the original checkpoint")


def resize_and_normalise(frames: torch.Tensor, height: int, width: int, recipe: PixelRecipe) -> torch.Tensor:
    """Bring frames to a size in pixels and to the numbers that the vision tower was trained on.

    Frames do not see each other: any split of a video into calls gives the same bits.

    Args:
        frames: uint8 [N, 3, H, W], RGB.

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
