"""Which patches of which frames a carried cache holds, as time goes by."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from statekv.analysis.concentration import Concentration, Curves, layers_to_look_at
from statekv.cache.carried import CarriedCache
from statekv.cache.stream import StreamState
from statekv.engine.engine import Engine
from statekv.engine.session import Session
from statekv.errors import VideoError
from statekv.models.adapter import Segment
from statekv.models.encoded import EncodedStep

MOST_MOMENTS = 48  # at which the cache is looked at
_LONGEST_SIDE = 128  # pixels of a picture that is kept to be shown

Shares = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Picture:
    """A step's first frame, reduced, and which of the stream's tokens stand for its patches.

    Attributes:
        tokens: [rows, columns] int64; the patches cover the whole frame, row by row; -1: left out by a reducer.
        pixels: [H, W, 3] uint8, reduced.
    """

    step: int
    pts_seconds: float
    tokens: NDArray[np.int64]
    pixels: NDArray[np.uint8]


@dataclass(frozen=True)
class Moment:
    """What the carried cache held after a step, by its number from 0; a share is of all layers and KV heads that were
    looked at.

    Attributes:
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
    """

    def __init__(self, layers: Sequence[int], expected: int) -> None:
        self.layers = layers
        self.pictures: list[Picture] = []
        self.moments: list[Moment] = []
        self._every_moment = -(-expected // MOST_MOMENTS)

    def enter(self, seen: EncodedStep, segment: Segment, first_token: int, placeholder: int) -> None:
        """Note a step that has entered: its pictures, its segment, the number of its first token, and the id that
        stands for a patch.
        """
        entered = (segment.ids[0] == placeholder).nonzero()[:, 0].cpu().numpy() + first_token
        tokens = np.full(seen.total, -1, np.int64)
        tokens[slice(None) if segment.kept is None else segment.kept.numpy()] = entered
        tokens = tokens.reshape(seen.grid)
        frame = seen.frames[0]
        self.pictures.append(Picture(len(self.pictures), frame.pts_seconds, tokens, reduced(frame.data)))

    def look(self, carried: CarriedCache, tokens: int) -> None:
        """Note what is held after the newest step, if this is one of the moments."""
        if (len(self.pictures) - 1) % self._every_moment == 0:
            self._note(carried, tokens)

    def finish(self, carried: CarriedCache, tokens: int) -> None:
        """The last step is a moment too."""
        if self.pictures and (not self.moments or self.moments[-1].step != self.pictures[-1].step):
            self._note(carried, tokens)

    def _note(self, carried: CarriedCache, tokens: int) -> None:
        held = held_shares([carried.kept(layer) for layer in self.layers], tokens)
        patches = [np.where(picture.tokens < 0, 0, held[picture.tokens]) for picture in self.pictures]
        text = 1 - sum(float(shares.sum()) for shares in patches) / float(held.sum())
        newest = self.pictures[-1]
        halves = [shares.astype(np.float16) for shares in patches]
        self.moments.append(Moment(newest.step, newest.pts_seconds, halves, text))


def held_shares(kept: Sequence[torch.Tensor], tokens: int) -> Shares:
    """For each token of a stream the share of layers and heads that hold it.

    Args:
        kept: for each layer [1, kv_heads, n] the tokens that it holds, -1 where a slot is empty.
        tokens: of the stream.
    """
    counts = sum(torch.bincount(layer[layer >= 0].long().cpu(), minlength=tokens) for layer in kept)
    assert isinstance(counts, torch.Tensor)
    heads = sum(layer.shape[0] * layer.shape[1] for layer in kept)
    shares: Shares = (counts.float() / heads).numpy()
    return shares


def reduced(pixels: torch.Tensor) -> NDArray[np.uint8]:
    """[3, H, W] uint8 → [H', W', 3] uint8, no side longer than it needs to be for a small picture."""
    shrink = max(1, -(-max(pixels.shape[1:]) // _LONGEST_SIDE))
    small: NDArray[np.uint8] = pixels[:, ::shrink, ::shrink].permute(1, 2, 0).cpu().contiguous().numpy()
    return small


@dataclass(frozen=True, kw_only=True)
class Analysis(Curves):
    """What was found in a video.

    Attributes:
        pictures: one for each step.
        moments: the carried cache as time goes by; the last one is the end.
    """

    frames: int
    pictures: list[Picture]
    moments: list[Moment]

    @property
    def length(self) -> str:
        """In words."""
        return f"{self.frames} frames, {self.tokens} tokens"

    @property
    def text(self) -> float:
        """Share of the stream's tokens that are no patches."""
        return 1 - sum(int((picture.tokens >= 0).sum()) for picture in self.pictures) / self.tokens


def analyse(
    engine: Engine,
    video: str | os.PathLike[str],
    *,
    max_frames: int,
    layers: Sequence[int] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Analysis:
    """Watch a video and say where attention goes and what is held.

    Both streams step through the video side by side; the vision tower runs once for both. Two detailed caches grow with
    the video, and the time of a step with full attention does too: `max_frames` bounds both. Beside them each layer's
    key scores live until the layer is done, and a stream of whatever length leaves a bounded number of pictures.

    Args:
        engine: a loaded model; its settings say how the carried cache is chosen.
        max_frames: frames at most, spread over the video.
        layers: indices of the layers to look at; None: all.
        on_step: called after each step with the frames seen.

    Raises:
        ConfigError: no such layer, or an engine whose carry is all, which has no carried cache.
        VideoError: the video cannot be opened, or has too few frames for three steps.
        HorizonError, MemoryLimitError: as `Session.push`.
    """
    chosen = layers_to_look_at(layers, engine.model.kv_spec().layers, engine.config)
    with engine.open(video, max_frames=max_frames) as session, torch.inference_mode():
        return watch(session, chosen, max_frames, on_step)


def watch(
    session: Session, layers: Sequence[int], max_frames: int, on_step: Callable[[int], None] | None = None
) -> Analysis:
    """As `analyse`, on a session that has just been opened and has a source."""
    state, runner = session.state, session.runner
    full = runner.open(state.config.with_(carry="all"), state.horizon, state.frames_expected, state.room)
    expected = -(-min(state.frames_expected or max_frames, max_frames) // runner.model.frames_per_step)
    concentration, holdings = Concentration(layers), Holdings(layers, expected)
    assert session.source is not None
    # Frames that are too few for a step are left out, as a session leaves them waiting.
    for frames in zip(*[session.source] * runner.model.frames_per_step, strict=False):
        (seen,) = runner.encode([frames], state.frames_expected)
        for segment in runner.segments_of(state, seen, compact=False):
            first = state.tokens
            observed = segment.kind == "step" and bool(holdings.pictures)
            if observed:
                concentration.begin(first, {layer: _carried(state).kept(layer)[0].long() for layer in layers})
            runner.enter(full, segment, observer=concentration.observe if observed else None)
            runner.enter(state, segment)
            if segment.kind == "step":
                holdings.enter(seen, segment, first, runner.model.video_token_id)
        holdings.look(_carried(state), state.tokens)
        if on_step is not None:
            on_step(state.frames)
    if len(holdings.pictures) < 3:  # one to be history, one to have a choice, one to choose again
        rule = f"the video gave {state.frames} frames, must be at least {3 * runner.model.frames_per_step}"
        raise VideoError(rule, "raise `fps` or `max_frames`")
    holdings.finish(_carried(state), state.tokens)
    return Analysis(
        budget=state.config.budget,
        frames=state.frames,
        steps=len(holdings.pictures),
        tokens=state.tokens,
        kv_heads=state.spec.kv_heads,
        shares=concentration.shares(),
        pictures=holdings.pictures,
        moments=holdings.moments,
    )


def _carried(state: StreamState) -> CarriedCache:
    carried = state.carried
    assert isinstance(carried, CarriedCache)
    return carried
