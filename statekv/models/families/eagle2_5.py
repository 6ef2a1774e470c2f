"""Eagle2.5: InternVL's way with another tower, and the time written before every frame.

Its code comes with the checkpoint. What is followed here was read in public: the model in NVlabs/Eagle
(Eagle2_5/eaglevl/model/eagle2_5/modeling_eagle2_5_vl.py), the processor in NVIDIA/Isaac-GR00T
(gr00t/model/backbone/eagle2_hg_model/processing_eagle2_5_vl.py and image_processing_eagle2_5_vl_fast.py). A frame of a
video is one tile there, whatever its size, and positions count tokens.

The processor writes a video's frame rate before its first frame if it is told one. A stream does not know how many
frames will be taken, so it is left out here, as the processor does when it is told the times alone.

The classes that an Eagle2.5 checkpoint brings along, completed so that transformers 5 can load them.

The public code (see eagle2_5.py) was written for transformers 4.51. Left alone it asks for flash_attention_2 on any
device, unless tower and language model are handed to its constructor; it does not call `post_init`, without which no
weights can be loaded; and it reads attributes that configurations have no more. Subclasses fill these gaps, and the
code itself stays as it came. Whoever calls these functions runs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM, SiglipVisionModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from statekv.cache.stream import StreamState
from statekv.models.encoded import EncodedStep
from statekv.models.families.internvl import InternVL
from statekv.models.preprocess import Eagle25Recipe
from statekv.models.prompt import Layout, VisionTokens, eagle2_5_step, eagle2_5_tokens

_LATE_SECONDS = 99999.99  # a time with as many digits as any of a video of a day


class Eagle25(InternVL):
    """`Eagle2_5_VLForConditionalGeneration` of nvidia/Eagle2.5-8B, which is not part of transformers."""

    generates_prompt = False

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

    def read_recipe(self, video_json: Mapping[str, Any]) -> None:
        self.recipe = Eagle25Recipe.from_dict(video_json)

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


def own_config(source: str, reference: str, **hub_kwargs: Any) -> Any:
    """The configuration of a checkpoint.

    Args:
        source: a hub id or a folder.
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
