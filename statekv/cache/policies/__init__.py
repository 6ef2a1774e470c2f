"""Which keys go on to the next step: one file a policy, tensors only.

`Candidates` and `Policy` are all that a policy of your own needs (docs/policy.md).
"""

from __future__ import annotations

from statekv.cache.policies.base import Candidates, Policy

__all__ = ["Candidates", "Policy"]
