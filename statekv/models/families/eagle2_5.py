"""Eagle2.5: InternVL's way with another tower, and the time written before every frame.

Its code comes with the checkpoint. What is followed here was read in public: the model in NVlabs/Eagle
(Eagle2_5/eaglevl/model/eagle2_5/modeling_eagle2_5_vl.py), the processor in NVIDIA/Isaac-GR00T
(gr00t/model/backbone/eagle2_hg_model/processing_eagle2_5_vl.py and image_processing_eagle2_5_vl_fast.py). A frame of a
video is one tile there, whatever its size, and positions count tokens.

The processor writes a video's frame rate before its first frame if it is told one. A stream does not know how many
frames will be taken, so it is left out here, as the processor does when it is told the times alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from statekv.cache.stream import StreamState
from statekv.models.base import Seen
from statekv.models.families.internvl import InternVL
from statekv.models.pixels import Eagle25Recipe
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

    def label(self, seen: Seen, state: StreamState) -> str:
        seconds = seen.frames[0].pts_seconds
        origin = seconds if state.origin_seconds is None else state.origin_seconds
        return self._timed(state.frames, seconds - origin, state.config.layout)

    def span(self, frames: int, height: int, width: int, layout: Layout, seconds: float | None = None) -> int:
        prompt, first = self.prompts[layout], self._timed(0, 0.0, layout)
        late = self._timed(frames, _LATE_SECONDS, layout)
        rest = max(0, frames - 1) * len(prompt.step_ids(late))
        return len(prompt.head_ids(first)) + len(prompt.first_step_ids(first)) + rest

    def _timed(self, index: int, seconds: float, layout: str) -> str:
        return eagle2_5_step(index, seconds, self.tokens_per_tile, self.prompts[layout].tokens)
