"""What differs between model families, and nothing else; families are looked up by a checkpoint's `model_type`.

A family is one file in `families/` and one row of the table here, which can be listed without importing torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from statekv.errors import ModelError

if TYPE_CHECKING:
    from statekv.models.adapter import VideoModel


@dataclass(frozen=True)
class Checkpoint:
    """A public checkpoint and what its configuration says of its keys.

    Attributes:
        name: on the hub.
        billions: parameters, vision tower included.
        layers, kv_heads, head_dim: of the language model.
        revision: commit at which its own code has been read; None: no commit is known here.
    """

    name: str
    billions: float
    layers: int
    kv_heads: int
    head_dim: int
    revision: str | None = None

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of one token in all layers, in half precision."""
        return 2 * self.layers * self.kv_heads * self.head_dim * 2


@dataclass(frozen=True)
class Family:
    """Where a family's adapter lives and which checkpoints are known to be of it.

    Attributes:
        module, adapter: the class that makes segments.
        checkpoints: known to be of this family; others load as well.
        tokens_per_frame: vision tokens, without the words around a frame.
        of_pixels: (width, height) of the video where that depends on it; None where it does not.
        own_code: a checkpoint brings the code of its model; that is run only if trusted, and at one commit, by the
            module's `own_config` and `own_model_class`.
        tested: what its adapter has been compared with, token for token.
    """

    module: str
    adapter: str
    checkpoints: tuple[Checkpoint, ...]
    tokens_per_frame: float
    of_pixels: tuple[int, int] | None = None
    own_code: bool = False
    tested: str = "transformers, tiny random weights"


FAMILIES = {
    "internvl": Family(
        "statekv.models.families.internvl",
        "InternVL",
        (
            Checkpoint("OpenGVLab/InternVL3-1B-hf", 0.94, 24, 2, 64),
            Checkpoint("OpenGVLab/InternVL3-2B-hf", 2.09, 28, 2, 128),
            Checkpoint("OpenGVLab/InternVL3-8B-hf", 7.94, 28, 4, 128),
            Checkpoint("OpenGVLab/InternVL3_5-1B-HF", 1.06, 28, 8, 128),
            Checkpoint("OpenGVLab/InternVL3_5-2B-HF", 2.35, 28, 8, 128),
            Checkpoint("OpenGVLab/InternVL3_5-4B-HF", 4.73, 36, 8, 128),
            Checkpoint("OpenGVLab/InternVL3_5-8B-HF", 8.53, 36, 8, 128),
        ),
        tokens_per_frame=256,
    ),
    "qwen3_vl": Family(
        "statekv.models.families.qwen3_vl",
        "Qwen3VL",
        (
            Checkpoint("Qwen/Qwen3-VL-2B-Instruct", 2.13, 28, 8, 128),
            Checkpoint("Qwen/Qwen3-VL-4B-Instruct", 4.44, 36, 8, 128),
            Checkpoint("Qwen/Qwen3-VL-8B-Instruct", 8.77, 36, 8, 128),
        ),
        # 7 x 4 patches of 32 pixels, two frames to a step: a stream of unknown length is sized as one of 768 frames.
        tokens_per_frame=14,
        of_pixels=(640, 360),
    ),
    "qwen3_vl_moe": Family(
        "statekv.models.families.qwen3_vl",
        "Qwen3VL",
        (Checkpoint("Qwen/Qwen3-VL-30B-A3B-Instruct", 31.1, 48, 4, 128),),
        tokens_per_frame=14,
        of_pixels=(640, 360),
    ),
    "qwen2_5_vl": Family(
        "statekv.models.families.qwen2_5_vl",
        "Qwen25VL",
        (
            Checkpoint("Qwen/Qwen2.5-VL-3B-Instruct", 3.75, 36, 2, 128),
            Checkpoint("Qwen/Qwen2.5-VL-7B-Instruct", 8.29, 28, 4, 128),
        ),
        tokens_per_frame=149.5,  # 23 x 13 patches of 28 pixels, two frames to a step
        of_pixels=(640, 360),
    ),
    "llava_onevision": Family(
        "statekv.models.families.llava_onevision",
        "LlavaOnevision",
        (
            Checkpoint("llava-hf/llava-onevision-qwen2-0.5b-ov-hf", 0.89, 24, 2, 64),
            Checkpoint("llava-hf/llava-onevision-qwen2-7b-ov-hf", 8.03, 28, 4, 128),
        ),
        tokens_per_frame=196,
    ),
    "eagle_2_5_vl": Family(
        "statekv.models.families.eagle2_5",
        "Eagle25",
        (Checkpoint("nvidia/Eagle2.5-8B", 8.07, 28, 4, 128),),
        tokens_per_frame=256,
        own_code=True,
        tested="a stand-in of its code, tiny random weights",
    ),
}


def adapter_of(model_type: str) -> type[VideoModel]:
    """The adapter class of a `model_type`; a ModelError for one that is not supported names those that are."""
    if model_type not in FAMILIES:
        raise ModelError(
            f"checkpoints of architecture {model_type!r} are not supported", f"supported: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[model_type]
    found: type[VideoModel] = getattr(import_module(family.module), family.adapter)
    return found
