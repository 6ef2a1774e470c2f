"""What InternVL, Eagle2.5 and LLaVA-OneVision share: every frame is a step, resized to one size whatever its shape."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from math import isqrt

import torch

from statekv.models.adapter import VideoModel
from statekv.models.encoded import EncodedStep
from statekv.models.preprocess import SquareRecipe, resize_and_normalise
from statekv.video.frame import Frame


class SquareFrames(VideoModel):
    """Any of them; `recipe` is set by `read_recipe`."""

    recipe: SquareRecipe

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
