"""Which patches of which frames a carried cache holds, as time goes by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from statekv.cache.carried import CarriedCache
from statekv.errors import ModelError
from statekv.models.base import Seen, Segment

MOST_MOMENTS = 48  # at which the cache is looked at
_LONGEST_SIDE = 128  # pixels of a picture that is kept to be shown

Shares = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Picture:
    """A step's first frame, and which of the stream's tokens stand for its patches.

    Attributes:
        step: number of the step, from 0.
        pts_seconds: time of the frame.
        tokens: [rows, columns] int64; the patches cover the whole frame, row by row.
        pixels: [H, W, 3] uint8, reduced.
    """

    step: int
    pts_seconds: float
    tokens: NDArray[np.int64]
    pixels: NDArray[np.uint8]


@dataclass(frozen=True)
class Moment:
    """What the carried cache held after a step; a share is of all layers and KV heads that were looked at.

    Attributes:
        step: number of the step, from 0.
        pts_seconds: its time.
        patches: for each step so far, [rows, columns].
        text: share of the cache that holds text: prompt, timestamps, marks around frames.
    """

    step: int
    pts_seconds: float
    patches: list[Shares]
    text: float

    @property
    def frames(self) -> Shares:
        """[step + 1] for each step so far the share that held its patches, mean over the patches."""
        return np.array([patches.mean(dtype=np.float32) for patches in self.patches], np.float32)


class Holdings:
    """Looks into a carried cache as a stream goes on.

    Moments are thinned out evenly to about MOST_MOMENTS. For each step there stays a small picture, and for each moment
    half a float for each patch seen so far: 50 MB in all for 1,024 frames of 256 patches.

    Args:
        layers: indices of the layers to look at.
        expected: steps of the stream, at most.
    """

    def __init__(self, layers: Sequence[int], expected: int) -> None:
        self.layers = layers
        self.pictures: list[Picture] = []
        self.moments: list[Moment] = []
        self._every_moment = -(-expected // MOST_MOMENTS)

    def enter(self, seen: Seen, segment: Segment, first_token: int, placeholder: int) -> None:
        """Note a step that has entered.

        Args:
            seen: its pictures.
            segment: the step.
            first_token: of the segment in the stream.
            placeholder: the id that stands for a patch.

        Raises:
            ModelError: a picture whose tokens make no grid.
        """
        places = (segment.ids[0] == placeholder).nonzero()[:, 0].cpu().numpy() + first_token
        tokens = places.reshape(token_grid(len(places), seen.grid))
        frame = seen.frames[0]
        self.pictures.append(Picture(len(self.pictures), frame.pts_seconds, tokens, reduced(frame.data)))

    def look(self, carried: CarriedCache, tokens: int) -> None:
        """Note what is held after the newest step, if this is one of the moments.

        Args:
            carried: the cache.
            tokens: of the stream so far.
        """
        if (len(self.pictures) - 1) % self._every_moment == 0:
            self._note(carried, tokens)

    def finish(self, carried: CarriedCache, tokens: int) -> None:
        """The last step is a moment too."""
        if self.pictures and (not self.moments or self.moments[-1].step != self.pictures[-1].step):
            self._note(carried, tokens)

    def _note(self, carried: CarriedCache, tokens: int) -> None:
        held = held_shares([carried.kept(layer) for layer in self.layers], tokens)
        patches = [held[picture.tokens] for picture in self.pictures]
        text = 1 - sum(float(shares.sum()) for shares in patches) / float(held.sum())
        newest = self.pictures[-1]
        halves = [shares.astype(np.float16) for shares in patches]
        self.moments.append(Moment(newest.step, newest.pts_seconds, halves, text))


def held_shares(kept: Sequence[torch.Tensor], tokens: int) -> Shares:
    """For each token of a stream the share of layers and heads that hold it.

    Args:
        kept: for each layer [1, kv_heads, n] the tokens that it holds.
        tokens: of the stream.
    """
    counts = sum(torch.bincount(layer.flatten().long().cpu(), minlength=tokens) for layer in kept)
    assert isinstance(counts, torch.Tensor)
    heads = sum(layer.shape[0] * layer.shape[1] for layer in kept)
    shares: Shares = (counts.float() / heads).numpy()
    return shares


def token_grid(tokens: int, patches: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a picture's tokens.

    Families merge square blocks of the vision tower's patches into a token, or resize every frame to a square.

    Args:
        tokens: of one picture.
        patches: rows and columns of patches; (0, 0) where every frame is a square.

    Raises:
        ModelError: so many tokens make no such grid.
    """
    rows, columns = patches
    if not rows * columns:
        rows = columns = isqrt(tokens)
    elif tokens:
        merged = isqrt(rows * columns // tokens)
        rows, columns = rows // max(1, merged), columns // max(1, merged)
    if not tokens or rows * columns != tokens:
        raise ModelError(
            f"a picture of {patches[0]} x {patches[1]} patches has {tokens} tokens, which make no grid",
            "this family cannot be drawn",
        )
    return rows, columns


def reduced(pixels: torch.Tensor) -> NDArray[np.uint8]:
    """[3, H, W] uint8 → [H', W', 3] uint8, no side longer than it needs to be for a small picture."""
    shrink = max(1, -(-max(pixels.shape[1:]) // _LONGEST_SIDE))
    small: NDArray[np.uint8] = pixels[:, ::shrink, ::shrink].permute(1, 2, 0).cpu().contiguous().numpy()
    return small
