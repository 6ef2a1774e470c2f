"""InternVL: every frame is one step, every token one position."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any, ClassVar

import torch
from transformers import InternVLConfig, PreTrainedTokenizerBase

from statekv.cache.stream import StreamState
from statekv.errors import ModelError
from statekv.models.adapter import Segment, check_placeholders, runs
from statekv.models.encoded import EncodedStep, Reduce, unchanged
from statekv.models.families.square import SMALL_TOWER, SquareFrames, SquareRecipe
from statekv.models.prompt import Layout, VisionTokens
from statekv.models.size import Size, qwen2, qwen2_7b, text_config


@dataclass(frozen=True)
class InternVLRecipe(SquareRecipe):
    """InternVL."""

    stock_class: ClassVar[str] = "InternVLVideoProcessor"


def internvl_tokens(tokenizer: PreTrainedTokenizerBase) -> VisionTokens:
    """InternVL names its tokens in the tokenizer's JSON, and stock takes them from there; a ModelError where it does
    not.
    """
    names = ("start_image_token", "end_image_token", "context_image_token", "video_token")
    found = [getattr(tokenizer, name, None) for name in names]
    missing = [name for name, token in zip(names, found, strict=True) if token is None]
    if missing:
        rule = f"the tokenizer does not define {', '.join(missing)}"
        raise ModelError(rule, "use the checkpoint that was converted for transformers, named …-hf")
    start, end, pad, placeholder = (str(token) for token in found)
    return VisionTokens(start, end, pad, placeholder, reserved=(start, end, pad, placeholder))


def internvl_step(index: int, num_tokens: int, tokens: VisionTokens, layout: Layout) -> str:
    """The text of one InternVL frame: `index` counts frames from 0, `num_tokens` vision tokens per frame."""
    vision = tokens.start + tokens.pad * num_tokens + tokens.end
    if layout == "release":
        return f"{vision}\n"
    newline = "\n" if index else ""
    return f"{newline}Frame{index + 1}: {vision}"


_DYNAMIC: dict[str, Any] = {"vocab": 151674, "rope_factor": 2.0}


class InternVL(SquareFrames):
    """`InternVLForConditionalGeneration`, for example OpenGVLab/InternVL3-1B-hf."""

    recipe_class: ClassVar[type[SquareRecipe]] = InternVLRecipe
    sizes: ClassVar[tuple[Size, ...]] = (
        qwen2("internvl3-1b", "internvl", 896, 4864, 24, 14, 2, 64, **_DYNAMIC),
        qwen2("internvl3-2b", "internvl", 1536, 8960, 28, 12, 2, 128, **_DYNAMIC),
        qwen2_7b("internvl3-8b", "internvl", **_DYNAMIC),
    )

    def vision_tokens(self, tokenizer: PreTrainedTokenizerBase) -> VisionTokens:
        return internvl_tokens(tokenizer)

    @classmethod
    def random_config(cls, size: Size) -> Any:
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": size.rope_theta}
        if size.rope_factor is not None:
            rope |= {"rope_type": "dynamic", "factor": size.rope_factor}
        return InternVLConfig(
            vision_config=SMALL_TOWER,
            text_config={"model_type": "qwen2", "rope_parameters": rope, **text_config(size)},
            tie_word_embeddings=size.tied,
        )

    @property
    def video_token_id(self) -> int:
        return int(self.model.config.image_token_id)

    @property
    def tokens_per_tile(self) -> int:
        """Vision tokens of a frame, and of each tile of an image."""
        return int(self.model.config.image_seq_length)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
        return found

    def step_text(self, seen: EncodedStep, state: StreamState) -> str:
        return self._numbered(state.frames, state.config.layout)

    def vision_segment(self, ids: Sequence[int], seen: EncodedStep, position: int) -> Segment:
        row, embeds, spot = self.embed_picture(ids, self.video_token_id, seen)
        positions = self.kept_positions(self.text_positions(position, len(ids)), spot.start, seen)
        following = position + len(ids)
        return Segment("step", row, embeds, positions, following, 1, seen.pts_seconds, kept=seen.kept)

    def max_positions(self, frames: int, height: int, width: int, layout: Layout, seconds: float | None = None) -> int:
        prompt = self.prompts[layout]
        first, longest = self._numbered(0, layout), self._numbered(max(frames, 1), layout)
        return len(prompt.head_ids(first)) + len(prompt.first_step_ids(first)) + frames * len(prompt.step_ids(longest))

    def segments(self, inputs: Mapping[str, Any], reduce: Reduce = unchanged) -> Iterator[Segment]:
        ids: list[int] = inputs["input_ids"][0].tolist()
        pixels, token = inputs.get("pixel_values"), self.video_token_id
        check_placeholders(ids.count(token), 0 if pixels is None else len(pixels) * self.tokens_per_tile)
        done, tile, position, side = 0, 0, 0, isqrt(self.tokens_per_tile)
        for start, stop, _ in runs(ids, [token]):
            if not done and start > 1:
                prefix = self.text("prefix", ids[: start - 1], position)  # all but the picture's start token
                yield prefix
                done, position = start - 1, prefix.next_position
            tiles = (stop - start) // self.tokens_per_tile
            features = self.features(inputs["pixel_values"][tile : tile + tiles]).flatten(0, 1)
            seen = reduce(EncodedStep((), features, (tiles * side, side)))
            # The picture's end token still belongs to the step.
            step = self.vision_segment(ids[done : stop + 1], seen, position)
            yield step
            done, tile, position = stop + 1, tile + tiles, step.next_position
        yield self.text("question", ids[done:], position)

    def _numbered(self, index: int, layout: str) -> str:
        prompt = self.prompts[layout]
        return internvl_step(index, self.tokens_per_tile, prompt.tokens, prompt.layout)
