"""What a stream's prefill has cost, by formula."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from statekv.config import Config
from statekv.engine.session import Session
from statekv.models.flops import Widths, step_flops
from statekv.video.frame import Frame


def prefill_flops(session: Session) -> int:
    """FLOPs of the language model for everything that is in the stream.

    The vision tower is left out: it sees each kept frame once, whatever the method.
    """
    return flops_of(session, [span.length for span in session.state.spans])


def clip_tokens(session: Session, frame: Frame) -> list[int]:
    """Tokens of each segment that recall="last_frames" encodes for one question.

    Args:
        session: what has been seen.
        frame: one of its frames; where labels tell the time, those of the others may differ from its by a token.
    """
    model, config = session.runner.model, session.state.config
    scratch, lengths = session.runner.open(config), []
    with torch.inference_mode():
        (seen,) = model.encode([[frame] * model.frames_per_step], session.state.frames_expected)
        for first in range(0, min(config.last_frames, session.frames), model.frames_per_step):
            scratch.frames = first
            lengths += [segment.length for segment in model.segments_of(seen, scratch)]
    return lengths


def flops_of(session: Session, lengths: Sequence[int]) -> int:
    """FLOPs of the language model for segments of so many tokens, entering one after the other."""
    config: Config = session.state.config
    widths = Widths.of(session.runner.model.text_config)
    budget = None if config.carry == "all" else config.budget
    # Queries meet keys twice where keys are scored, once elsewhere.
    products = 3 if config.carry == "attention" else 2
    return sum(step_flops(widths, lengths, budget, products))
