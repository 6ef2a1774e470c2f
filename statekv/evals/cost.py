"""What a stream's prefill has cost, by formula."""

from __future__ import annotations

from collections.abc import Sequence

from statekv.engine.answer import waiting_steps
from statekv.engine.session import Session
from statekv.models.flops import Widths, pairs_flops, step_flops


def prefill_flops(session: Session) -> int:
    """FLOPs of the language model for everything that has entered the stream, forgotten steps too.

    The vision tower is left out: it sees each kept frame once, whatever the method.
    """
    widths = Widths.of(session.runner.model.text_config)
    return pairs_flops(widths, session.state.tokens, session.state.pairs, _products(session))


def clip_tokens(session: Session) -> list[int]:
    """Tokens of each segment encoded for one question about what has been seen, where the newest frames alone are."""
    runner = session.runner
    scratch, lengths = runner.open(session.state.config), []
    for seen in waiting_steps(runner, scratch, session.queue.waiting):
        lengths += [segment.length for segment in runner.segments_of(scratch, seen, compact=False)]
        scratch.frames += len(seen.frames)
        scratch.origin_seconds = session.queue.waiting[0].pts_seconds
    return lengths


def flops_of(session: Session, lengths: Sequence[int]) -> int:
    """FLOPs of the language model for segments of so many tokens, entering one after the other."""
    return sum(segment_flops(session, lengths))


def segment_flops(session: Session, lengths: Sequence[int]) -> list[int]:
    """Those of each segment."""
    widths = Widths.of(session.runner.model.text_config)
    budget = None if session.state.policy is None else session.state.config.budget
    return list(step_flops(widths, lengths, budget, _products(session)))


def _products(session: Session) -> int:
    """Queries meet keys twice where keys are scored, once elsewhere."""
    policy = session.state.policy
    return 3 if policy is not None and policy.needs_attention else 2
