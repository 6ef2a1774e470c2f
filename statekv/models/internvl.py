"""InternVL: every frame is one step, every token one position."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from statekv.cache.stream import StreamState
from statekv.models.base import Segment, VideoModel, check_placeholders, fill_placeholders, runs
from statekv.models.pixels import InternVLRecipe, resize_and_normalise
from statekv.models.prompt import Layout, VisionTokens, internvl_step, internvl_tokens
from statekv.video.frame import Frame


class InternVL(VideoModel):
    """`InternVLForConditionalGeneration`, for example OpenGVLab/InternVL3-1B-hf."""

    def vision_tokens(self, tokenizer: PreTrainedTokenizerBase) -> VisionTokens:
        return internvl_tokens(tokenizer)

    @property
    def video_token_id(self) -> int:
        return int(self.model.config.image_token_id)

    def read_recipe(self, video_json: Mapping[str, Any]) -> None:
        self.recipe = InternVLRecipe.from_dict(video_json)

    def enter(self, frames: Sequence[Frame], state: StreamState) -> list[Segment]:
        (frame,) = frames
        device = self.model.device
        pixels = resize_and_normalise(frame.data[None].to(device), self.recipe.height, self.recipe.width, self.recipe)
        layout = state.config.layout
        prompt = self.prompts[layout]
        text = self._label(state.frames, layout)
        if state.frames:
            return [self._picture(prompt.step_ids(text), pixels, state.position, frame.pts_seconds)]
        entering: list[Segment] = []
        if head := prompt.head_ids(text):
            entering.append(self.text("prefix", head, state.position))
        position = entering[-1].next_position if entering else state.position
        return [*entering, self._picture(prompt.first_step_ids(text), pixels, position, frame.pts_seconds)]

    def span(self, frames: int, height: int, width: int, layout: Layout) -> int:
        prompt = self.prompts[layout]
        first, longest = self._label(0, layout), self._label(max(frames, 1), layout)
        return len(prompt.head_ids(first)) + len(prompt.first_step_ids(first)) + frames * len(prompt.step_ids(longest))

    def segments(self, inputs: Mapping[str, Any]) -> Iterator[Segment]:
        ids: torch.Tensor = inputs["input_ids"][0]
        pixels = inputs.get("pixel_values")
        given = 0 if pixels is None else len(pixels) * self.model.config.image_seq_length
        check_placeholders(int((ids == self.model.config.image_token_id).sum()), given)
        done, patch, position = 0, 0, 0
        for start, stop, _ in runs(ids, [self.model.config.image_token_id]):
            if not done and start > 1:
                prefix = self.text("prefix", ids[: start - 1], position)  # all but the picture's start token
                yield prefix
                done, position = start - 1, prefix.next_position
            patches = (stop - start) // self.model.config.image_seq_length
            # The picture's end token still belongs to the step.
            shown: torch.Tensor = inputs["pixel_values"][patch : patch + patches]
            step = self._picture(ids[done : stop + 1], shown, position, None)
            yield step
            done, patch, position = stop + 1, patch + patches, step.next_position
        yield self.text("question", ids[done:], position)

    def _label(self, index: int, layout: str) -> str:
        prompt = self.prompts[layout]
        return internvl_step(index, self.model.config.image_seq_length, prompt.tokens, prompt.layout)

    def _picture(
        self, ids: Sequence[int] | torch.Tensor, pixels: torch.Tensor, position: int, pts_seconds: float | None
    ) -> Segment:
        words = self.text("step", ids, position)
        features = self.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output  # [n, t, hidden]
        spots = words.ids == self.model.config.image_token_id
        embeds = fill_placeholders(words.embeds, spots, features.flatten(0, 1))
        return Segment("step", words.ids, embeds, words.positions, words.next_position, 1, pts_seconds)
