"""Eagle2.5: InternVL's way with another tower, and the time written before every frame.

Its code comes with the checkpoint. What is followed here was read in public: the model in NVlabs/Eagle
(Eagle2_5/eaglevl/model/eagle2_5/modeling_eagle2_5_vl.py), the processor in NVIDIA/Isaac-GR00T
(gr00t/model/backbone/eagle2_hg_model/processing_eagle2_5_vl.py and image_processing_eagle2_5_vl_fast.py). A frame of a
video is one tile there, whatever its size, and positions count tokens.

The processor writes a video's frame rate before its first frame if it is told one. A stream does not know how many
frames will be taken, so it is left out here, as the processor does when it is told the times alone.

The classes that a checkpoint brings along are completed so that transformers 5 can load them. The public code was
written for transformers 4.51: left alone it asks for flash_attention_2 on any device, unless tower and language model
are handed to its constructor; it does not call `post_init`, without which no weights can be loaded; and it reads
attributes that configurations have no more. Subclasses fill these gaps, and the code itself stays as it came. Whoever
calls `own_config` and `own_model_class` runs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionModel,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from statekv.cache.stream import StreamState
from statekv.errors import ModelError
from statekv.models.encoded import EncodedStep
from statekv.models.families.internvl import InternVL
from statekv.models.families.square import SquareRecipe
from statekv.models.preprocess import value_of
from statekv.models.prompt import Layout, VisionTokens
from statekv.models.size import Size, qwen2_7b, text_config

_LATE_SECONDS = 99999.99  # a time with as many digits as any of a video of a day


@dataclass(frozen=True)
class Eagle25Recipe(SquareRecipe):
    """Eagle2.5: a frame of a video is one tile, and an image processor's JSON says how tiles are made."""

    stock_class: ClassVar[str] = "Eagle2_5_VLImageProcessorFast"

    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    height: int = 448
    width: int = 448

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Eagle25Recipe:
        # Cutting into tiles resizes, whatever do_resize says of the tiles themselves.
        tiled = {**values, "do_resize": True, "video_processor_type": values.get("image_processor_type")}
        recipe = super().from_dict(tiled)
        side = {"height": recipe.height, "width": recipe.height}
        kept = {"pad_during_tiling": False, "min_dynamic_tiles": 1, "crop_size": side, "size": side}
        wrong = {key: values[key] for key, value in kept.items() if value_of(values, key, value) != value}
        if wrong:
            told = ", ".join(f"{key}={value}" for key, value in wrong.items())
            rule = f"the image processor asks for {told}, which is not reproduced"
            raise ModelError(rule, "a frame must become one square tile, without padding")
        return recipe


def eagle2_5_tokens() -> VisionTokens:
    """Eagle2.5's tokens, which its processor knows by name; its template numbers pictures and videos from 1."""
    marks = ("<img>", "</img>", "<IMG_CONTEXT>", "<video-1>")
    return VisionTokens(*marks, reserved=(*marks, "<image-1>"), opens="The first video: ")


def eagle2_5_step(index: int, seconds: float, num_tokens: int, tokens: VisionTokens) -> str:
    """The text of one Eagle2.5 frame: counted from 0, with its time from the video's first frame."""
    vision = tokens.start + tokens.pad * num_tokens + tokens.end
    return f"Frame {index + 1} sample at {seconds:.2f}s: {vision}"


class Eagle25(InternVL):
    """`Eagle2_5_VLForConditionalGeneration` of nvidia/Eagle2.5-8B, which is not part of transformers."""

    recipe_class: ClassVar[type[SquareRecipe]] = Eagle25Recipe
    generates_prompt = False
    sizes: ClassVar[tuple[Size, ...]] = (qwen2_7b("eagle2.5-8b", "eagle_2_5_vl", 152064),)

    @classmethod
    def random_config(cls, size: Size) -> Any:
        rope = {"rope_type": "default", "rope_theta": size.rope_theta}
        return _RandomConfig({"rope_parameters": rope, **text_config(size)}, tie_word_embeddings=size.tied)

    @classmethod
    def random_model(cls, size: Size, dtype: torch.dtype) -> Any:
        return _Random._from_config(cls.random_config(size), dtype=dtype)  # type: ignore[no-untyped-call]

    @property
    def generator(self) -> Any:
        return self.model.language_model

    @property
    def language_model(self) -> Any:
        return self.model.language_model.model

    @property
    def tokens_per_tile(self) -> int:
        return int(self.model.num_image_token)

    @property
    def video_token_id(self) -> int:
        return int(self.model.config.image_token_index)

    def vision_tokens(self, tokenizer: PreTrainedTokenizerBase) -> VisionTokens:
        return eagle2_5_tokens()

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model.extract_feature(pixels)
        return found

    def step_text(self, seen: EncodedStep, state: StreamState) -> str:
        seconds = seen.frames[0].pts_seconds
        origin = seconds if state.origin_seconds is None else state.origin_seconds
        return self._timed(state.frames, seconds - origin, state.config.layout)

    def max_positions(self, frames: int, height: int, width: int, layout: Layout, seconds: float | None = None) -> int:
        prompt, first = self.prompts[layout], self._timed(0, 0.0, layout)
        late = self._timed(frames, _LATE_SECONDS, layout)
        rest = max(0, frames - 1) * len(prompt.step_ids(late))
        return len(prompt.head_ids(first)) + len(prompt.first_step_ids(first)) + rest

    def _timed(self, index: int, seconds: float, layout: str) -> str:
        return eagle2_5_step(index, seconds, self.tokens_per_tile, self.prompts[layout].tokens)


class _RandomConfig(PreTrainedConfig):
    model_type = "eagle_2_5_vl"
    sub_configs = {"text_config": Qwen2Config}  # noqa: RUF012

    def __init__(self, text_config: dict[str, Any] | None = None, **others: Any) -> None:
        self.text_config = Qwen2Config(**(text_config or {}))
        super().__init__(**others)


class _Random(PreTrainedModel):
    """What of Eagle2.5 is part of transformers, under the name that it has in the code of the checkpoint."""

    config_class = _RandomConfig

    def __init__(self, config: _RandomConfig) -> None:
        super().__init__(config)
        self.language_model = Qwen2ForCausalLM(config.text_config)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> Any:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.language_model.get_output_embeddings()


def own_config(source: str, reference: str, **hub_kwargs: Any) -> Any:
    """The configuration of a checkpoint.

    Args:
        reference: module and class, as `auto_map` in the checkpoint's config.json has it.
        hub_kwargs: as for `from_pretrained` (revision …).

    Raises:
        OSError, ImportError, AttributeError: the code is not there, or does not run here.
    """
    return completed_config(get_class_from_dynamic_module(reference, source, **hub_kwargs)).from_pretrained(
        source, **hub_kwargs
    )


def own_model_class(source: str, reference: str, **hub_kwargs: Any) -> Any:
    """The class of a checkpoint's model; arguments and errors are those of `own_config`."""
    return completed_model(get_class_from_dynamic_module(reference, source, **hub_kwargs))


def completed_config(found: Any) -> Any:
    """A subclass that can be written down, which transformers does with each configuration that it reads."""

    class Completed(found):  # type: ignore[misc]
        _attn_implementation_autoset = False

        # Without one of its own, transformers would write a constructor that leaves out the one below.
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    return _named_as(found, Completed)


def completed_model(found: Any) -> Any:
    """A subclass that can be built and loaded, on any device."""

    class Completed(found):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            tower, language = SiglipVisionModel(config.vision_config), Qwen2ForCausalLM(config.text_config)
            super().__init__(config, vision_model=tower, language_model=language)
            self.post_init()

        def _init_weights(self, module: Any) -> None:
            """Nothing to do: all weights come from the checkpoint."""

    return _named_as(found, Completed)


def _named_as(found: Any, completed: Any) -> Any:
    completed.__name__ = completed.__qualname__ = found.__name__
    return completed
