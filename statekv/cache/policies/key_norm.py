"""Keys of small norm: what a prefill without an attention map can go by."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from statekv.cache.policies.base import Candidates, Policy


@dataclass(frozen=True)
class KeyNorm(Policy):
    """Tokens whose keys are shortest, all heads of a layer taken together, after rotation.

    QuickVideo (arXiv 2505.16175; TIGER-AI-Lab/QuickVideo, `key_norms_small`), after Devoto et al. (arXiv 2406.11430).
    There a group of frames is pruned once, when it has entered; here carried keys compete again at every step, as they
    do for every policy. All heads keep the same tokens, so that slots of one number belong to one token.
    """

    joint_heads = True

    def score(self, candidates: Candidates) -> torch.Tensor:
        norms: torch.Tensor = torch.linalg.vector_norm(candidates.keys, dim=(1, 3), dtype=torch.float32)  # [streams, K]
        return norms.neg()[:, None].expand(candidates.token_ids.shape)
