"""What InternVL, Eagle2.5 and LLaVA-OneVision share: every frame is a step, resized to one size whatever its shape."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any, ClassVar, TypeVar

import torch

from statekv.errors import ModelError
from statekv.models.adapter import Texts, VideoModel
from statekv.models.encoded import EncodedStep
from statekv.models.preprocess import PixelRecipe, common_of, resize_and_normalise, size_of
from statekv.video.frame import Frame

# A vision tower that costs nothing, for models with random weights.
SMALL_TOWER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}

Recipe = TypeVar("Recipe", bound="SquareRecipe")


@dataclass(frozen=True)
class SquareRecipe(PixelRecipe):
    """Every frame to one size, in pixels, whatever its shape. Defaults are those that the stock classes share."""

    stock_class: ClassVar[str]

    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    height: int = 384
    width: int = 384

    @classmethod
    def from_dict(cls: type[Recipe], values: Mapping[str, Any]) -> Recipe:
        """Read the JSON of a checkpoint, as `common_of`; missing and null keys take the stock class's defaults."""
        size = size_of(values, {"height": cls.height, "width": cls.width})
        common = common_of(values, cls.stock_class, cls())
        return cls(**common, height=size[0], width=size[1])


class SquareFrames(VideoModel):
    """Any of them; `recipe` is set by `read_recipe`."""

    recipe_class: ClassVar[type[SquareRecipe]]
    recipe: SquareRecipe

    def read_recipe(self, video_json: Mapping[str, Any]) -> None:
        self.recipe = self.recipe_class.from_dict(video_json)

    def _read(self, texts: Texts) -> None:
        super()._read(texts)
        found, side = (self.recipe.height, self.recipe.width), self.model.config.vision_config.image_size
        sides = (side, side) if isinstance(side, int) else tuple(side)
        if found != sides:
            rule = f"the video processor makes pictures of {found} pixels, the model looks at {sides}"
            raise ModelError(rule, "use the JSON files of the same checkpoint")

    def size(self, height: int, width: int, frames: int) -> tuple[int, int]:
        return self.recipe.height, self.recipe.width

    @abstractmethod
    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the tower makes of frames: float32 [n, 3, H, W] → [n, tokens, hidden]."""

    def encode(self, steps: Sequence[Sequence[Frame]], frames_expected: int | None = None) -> list[EncodedStep]:
        frames = [frame for (frame,) in steps]
        pictures = [frame.data for frame in frames]
        if len({picture.shape for picture in pictures}) == 1:
            pixels = self._pixels(torch.stack(pictures))
        else:
            pixels = torch.cat([self._pixels(picture[None]) for picture in pictures])
        features = self.features(pixels)
        side = isqrt(features.shape[1])
        return [EncodedStep((frame,), found, (side, side)) for frame, found in zip(frames, features, strict=True)]

    def _pixels(self, frames: torch.Tensor) -> torch.Tensor:
        device = self.model.device
        return resize_and_normalise(frames.to(device), self.recipe.height, self.recipe.width, self.recipe)
