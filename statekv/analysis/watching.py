"""One video watched twice at once: with full attention, and with the carried cache that is looked into."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch

from statekv.analysis.concentration import Concentration, LayerShares
from statekv.analysis.holdings import Holdings, Moment, Picture
from statekv.cache.carried import CarriedCache
from statekv.cache.stream import StreamState
from statekv.engine.engine import Engine
from statekv.engine.session import Session
from statekv.errors import ConfigError, VideoError
from statekv.video.frame import Frame


@dataclass(frozen=True)
class Analysis:
    """What was found.

    Attributes:
        budget: of the carried cache.
        frames, steps, tokens: of the stream.
        kv_heads: of each layer.
        shares: a row for each layer.
        pictures: one for each step.
        moments: the carried cache as time goes by; the last one is the end.
    """

    budget: int
    frames: int
    steps: int
    tokens: int
    kv_heads: int
    shares: list[LayerShares]
    pictures: list[Picture]
    moments: list[Moment]

    @property
    def text(self) -> float:
        """Share of the stream's tokens that are no patches."""
        return 1 - sum(picture.tokens.size for picture in self.pictures) / self.tokens

    def mean_shares(self) -> LayerShares:
        """The mean over layers, as layer -1."""
        captured, recall, retention = (
            tuple(np.mean([getattr(row, name) for row in self.shares], axis=0).tolist())
            for name in ("captured", "recall", "retention")
        )
        best, carried = fmean(row.best for row in self.shares), fmean(row.carried for row in self.shares)
        return LayerShares(-1, captured, recall, retention, best, carried)


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
        video: path or URL.
        max_frames: frames at most, spread over the video.
        layers: indices of the layers to look at; None: all.
        on_step: called after each step with the frames seen.

    Raises:
        ConfigError: no such layer, or an engine whose carry is all, which has no carried cache.
        VideoError: the video cannot be opened, or has too few frames for three steps.
        HorizonError, MemoryLimitError: as `Session.push`.
    """
    chosen = _checked(engine, layers)
    with engine.open(video, max_frames=max_frames) as session, torch.inference_mode():
        return watch(session, chosen, max_frames, on_step)


def watch(
    session: Session, layers: Sequence[int], max_frames: int, on_step: Callable[[int], None] | None = None
) -> Analysis:
    """As `analyse`, on a session that has just been opened and has a source."""
    state, stepper = session.state, session.stepper
    full = stepper.open(state.config.with_(carry="all"), state.horizon, state.frames_expected, state.room)
    expected = -(-min(state.frames_expected or max_frames, max_frames) // stepper.model.frames_per_step)
    concentration, holdings = Concentration(layers), Holdings(layers, expected)
    assert session.source is not None
    for frames in _steps(session.source, stepper.model.frames_per_step):
        (seen,) = stepper.model.look([frames], state.frames_expected)
        for segment in stepper.model.enter(seen, state):
            first = state.tokens
            observed = segment.kind == "step" and bool(holdings.pictures)
            if observed:
                concentration.begin(first, {layer: _carried(state).kept(layer)[0].long() for layer in layers})
            stepper.prefill(full, segment, observer=concentration.observe if observed else None)
            stepper.prefill(state, segment)
            if segment.kind == "step":
                holdings.enter(seen, segment, first, stepper.model.video_token_id)
        holdings.look(_carried(state), state.tokens)
        if on_step is not None:
            on_step(state.frames)
    if len(holdings.pictures) < 3:  # one to be history, one to have a choice, one to choose again
        needed = 3 * stepper.model.frames_per_step
        raise VideoError(f"the video gave {state.frames} frames, must be at least {needed}", "raise fps or max_frames")
    holdings.finish(_carried(state), state.tokens)
    found = concentration.shares()
    steps, heads = len(holdings.pictures), state.geometry.kv_heads
    tokens, budget = state.tokens, state.config.budget
    return Analysis(budget, state.frames, steps, tokens, heads, found, holdings.pictures, holdings.moments)


def _checked(engine: Engine, layers: Sequence[int] | None) -> Sequence[int]:
    if engine.config.carry == "all":
        raise ConfigError("carry is 'all', but where every key is carried there is nothing to look into", "set carry")
    known = engine.model.geometry().layers
    for layer in layers or ():
        if not 0 <= layer < known:
            raise ConfigError(f"layer {layer} is not there, the model has 0 to {known - 1}", "leave it out")
    return range(known) if layers is None else sorted(set(layers))


def _steps(source: Iterator[Frame], size: int) -> Iterator[list[Frame]]:
    """Frames by the step; those that are too few for one are left out, as a session leaves them waiting."""
    waiting: list[Frame] = []
    for frame in source:
        waiting.append(frame)
        if len(waiting) == size:
            yield waiting
            waiting = []


def _carried(state: StreamState) -> CarriedCache:
    carried = state.carried
    assert isinstance(carried, CarriedCache)
    return carried
