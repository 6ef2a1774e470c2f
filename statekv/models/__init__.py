"""What differs between model families, and nothing else; families are looked up by a checkpoint's `model_type`."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from statekv.errors import ModelError

if TYPE_CHECKING:
    from statekv.models.base import VideoModel


@dataclass(frozen=True)
class Family:
    """Where a family's adapter lives and which checkpoints are known to be of it."""

    module: str
    adapter: str
    checkpoints: tuple[str, ...]


FAMILIES = {
    "internvl": Family(
        "statekv.models.internvl",
        "InternVL",
        ("OpenGVLab/InternVL3-1B-hf", "OpenGVLab/InternVL3-2B-hf", "OpenGVLab/InternVL3-8B-hf"),
    ),
    "qwen3_vl": Family(
        "statekv.models.qwen3_vl",
        "Qwen3VL",
        ("Qwen/Qwen3-VL-2B-Instruct", "Qwen/Qwen3-VL-4B-Instruct", "Qwen/Qwen3-VL-8B-Instruct"),
    ),
    "qwen2_5_vl": Family(
        "statekv.models.qwen2_5_vl",
        "Qwen25VL",
        ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct"),
    ),
    "llava_onevision": Family(
        "statekv.models.llava_onevision",
        "LlavaOnevision",
        ("llava-hf/llava-onevision-qwen2-0.5b-ov-hf", "llava-hf/llava-onevision-qwen2-7b-ov-hf"),
    ),
}


def adapter(model_type: str) -> type[VideoModel]:
    """The adapter class of a `model_type`.

    Raises:
        ModelError: a family that is not supported; the known ones are named.
    """
    if model_type not in FAMILIES:
        raise ModelError(
            f"checkpoints of architecture {model_type!r} are not supported", f"supported: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[model_type]
    found: type[VideoModel] = getattr(import_module(family.module), family.adapter)
    return found
