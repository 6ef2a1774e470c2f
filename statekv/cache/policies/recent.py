"""By age alone: a window, with or without attention sinks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from statekv.cache.policies.base import Candidates, Policy


@dataclass(frozen=True)
class Recent(Policy):
    """The newest keys."""

    def score(self, candidates: Candidates) -> torch.Tensor:
        return candidates.token_ids.double()  # float32 would tie neighbours behind 2^24 tokens


@dataclass(frozen=True)
class SinkRecent(Recent):
    """The first keys of the stream, and the newest (StreamingLLM, arXiv 2309.17453)."""

    sinks = 4
