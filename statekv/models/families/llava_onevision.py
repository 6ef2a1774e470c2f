"""LLaVA-OneVision: bare frames of few tokens each, and one learned newline behind the last of them.

The newline stands for no picture: it belongs to the text that follows a video, so that a question brings it along and
a stream that goes on never holds one in its middle.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any, ClassVar

import torch
from transformers import LlavaOnevisionConfig, PreTrainedTokenizerBase

from statekv.cache.stream import StreamState
from statekv.models.adapter import Segment, check_placeholders, runs, without_dropped
from statekv.models.encoded import EncodedStep, Reduce, unchanged
from statekv.models.families.square import SMALL_TOWER, SquareFrames, SquareRecipe
from statekv.models.prompt import Layout, VisionTokens
from statekv.models.size import Size, qwen2_7b, text_config


@dataclass(frozen=True)
class LlavaOnevisionRecipe(SquareRecipe):
    """LLaVA-OneVision."""

    stock_class: ClassVar[str] = "LlavaOnevisionVideoProcessor"


def llava_onevision_tokens(tokenizer: PreTrainedTokenizerBase) -> VisionTokens:
    """LLaVA-OneVision's tokens: one placeholder for every token of a video, and one more behind its last frame."""
    pad = str(getattr(tokenizer, "video_token", "<video>"))
    image = str(getattr(tokenizer, "image_token", "<image>"))
    return VisionTokens("", "", pad, placeholder=pad, reserved=(pad, image), closes=pad)


class LlavaOnevision(SquareFrames):
    """`LlavaOnevisionForConditionalGeneration`, for example llava-hf/llava-onevision-qwen2-0.5b-ov-hf."""

    recipe_class = LlavaOnevisionRecipe
    sizes: ClassVar[tuple[Size, ...]] = (
        qwen2_7b("llava-onevision-7b", "llava_onevision", 152000, tokens_per_step=196),
    )

    def vision_tokens(self, tokenizer: PreTrainedTokenizerBase) -> VisionTokens:
        return llava_onevision_tokens(tokenizer)

    @classmethod
    def random_config(cls, size: Size) -> Any:
        rope = {"rope_type": "default", "rope_theta": size.rope_theta}
        return LlavaOnevisionConfig(
            vision_config={"model_type": "siglip_vision_model", **SMALL_TOWER},
            text_config={"model_type": "qwen2", "rope_parameters": rope, **text_config(size)},
            tie_word_embeddings=size.tied,
        )

    @property
    def video_token_id(self) -> int:
        return int(self.model.config.video_token_id)

    @property
    def tokens_per_frame(self) -> int:
        """The tower's patches, pooled two by two."""
        vision = self.model.config.vision_config
        side = -(-(vision.image_size // vision.patch_size) // 2)
        return int(side * side)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        # Each frame as a video of its own; some versions of transformers put the newline behind each video here.
        found: torch.Tensor = self.model.get_video_features(pixels.unsqueeze(1), return_dict=True).pooler_output
        return found[:, : self.tokens_per_frame]

    def step_text(self, seen: EncodedStep, state: StreamState) -> str:
        return self.prompts[state.config.layout].tokens.pad * seen.total

    def vision_segment(self, ids: Sequence[int], seen: EncodedStep, position: int) -> Segment:
        """The picture stands behind the text; a video's placeholder within the text is a newline."""
        first = len(ids) - seen.total
        segment = self.text("step", without_dropped(ids, first, seen), position)
        segment.embeds[:, first:] = seen.features.to(segment.embeds)
        positions = self.kept_positions(self.text_positions(position, len(ids)), first, seen)
        placed = replace(segment, positions=positions, next_position=position + len(ids), kept=seen.kept)
        return replace(placed, frames=1, pts_seconds=seen.pts_seconds)

    def text(self, kind: str, ids: Sequence[int] | torch.Tensor, position: int) -> Segment:
        segment = super().text(kind, ids, position)
        newline = (segment.ids == self.video_token_id).unsqueeze(-1)
        return replace(segment, embeds=torch.where(newline, self._newline.to(segment.embeds), segment.embeds))

    def max_positions(self, frames: int, height: int, width: int, layout: Layout, seconds: float | None = None) -> int:
        prompt = self.prompts[layout]
        return len(prompt.head_ids(prompt.tokens.pad)) + frames * self.tokens_per_frame

    def segments(self, inputs: Mapping[str, Any], reduce: Reduce = unchanged) -> Iterator[Segment]:
        ids: list[int] = inputs["input_ids"][0].tolist()
        pieces = dict(zip(self._placeholders, (self._images(inputs), self._videos(inputs)), strict=True))
        done = position = 0
        for start, stop, token in runs(ids, self._placeholders):
            if not done and start:
                yield self.text("prefix", ids[:start], 0)
                done = position = start
            reached = start
            # The chat template may put pictures side by side, so that a run of placeholders holds several.
            while reached < stop:
                features, is_picture = next(pieces[token], (self._newline[:0], False))
                if not 0 < len(features) <= stop - reached:
                    check_placeholders(stop - start, reached + len(features) - start)
                reached += len(features)
                if is_picture:
                    seen = reduce(EncodedStep((), features, self._grid(len(features))))
                    step = self.vision_segment(ids[done:reached], seen, position)
                    yield step
                    done, position = reached, step.next_position
        for token, rest in pieces.items():
            check_placeholders(ids.count(token), ids.count(token) + sum(len(features) for features, _ in rest))
        yield self.text("question", ids[done:], position)

    def _grid(self, tokens: int) -> tuple[int, int]:
        """Images are several tiles with newlines in them: one row."""
        side = isqrt(tokens)
        return (side, side) if tokens == self.tokens_per_frame else (1, tokens)

    @property
    def _placeholders(self) -> tuple[int, int]:
        return int(self.model.config.image_token_id), self.video_token_id

    @property
    def _newline(self) -> torch.Tensor:
        """[1, hidden]"""
        found: torch.Tensor = self.model.model.image_newline
        return found[None]

    def _videos(self, inputs: Mapping[str, Any]) -> Iterator[tuple[torch.Tensor, bool]]:
        """Features [n, hidden] for the placeholders of all videos in order, and whether they are a picture."""
        videos = inputs.get("pixel_values_videos")
        for video in () if videos is None else videos:
            for frame in video:
                yield self.features(frame[None])[0], True
            yield self._newline, False

    def _images(self, inputs: Mapping[str, Any]) -> Iterator[tuple[torch.Tensor, bool]]:
        """The same for images: one tile of the whole and tiles of its parts, newlines in them, made by stock."""
        pixels, together = inputs.get("pixel_values"), inputs.get("batch_num_images")
        pictures = () if pixels is None else pixels
        counts = [1] * len(pictures) if together is None else [int(n) for n in together for _ in range(int(n))]
        for i, (picture, count) in enumerate(zip(pictures, counts, strict=False)):
            sizes = inputs["image_sizes"][i : i + 1]
            seen = self.model.get_image_features(picture[None], sizes, batch_num_images=[count], return_dict=True)
            yield seen.pooler_output[0], True
