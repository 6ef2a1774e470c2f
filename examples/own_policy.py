"""A carry policy of one's own beside those that are there, at one budget: python examples/own_policy.py"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import statekv
from statekv.cache.policies import Candidates, Policy
from statekv.evals.cards import write_film, write_story
from statekv.evals.cards.world import questions


@dataclass(frozen=True)
class Unlike(Policy):
    """Keep the keys that are least like the mean key of their head: what is common can be guessed, what is rare not.

    The idea is KeyDiff's (arXiv 2504.15364), for which no attention map is needed.
    """

    def score(self, candidates: Candidates) -> torch.Tensor:
        keys = torch.nn.functional.normalize(candidates.keys.float(), dim=-1)  # [streams, kv_heads, K, head_dim]
        return -(keys * keys.mean(-2, keepdim=True)).sum(-1)


engine = statekv.load("demo", budget=64)
right: dict[str, int] = {}
asked = 0
with tempfile.TemporaryDirectory() as folder:
    for seed in range(2):
        story = write_story(seed=2_000_000_000 + seed, duration_seconds=40)
        film = Path(folder, f"{seed}.mp4")
        write_film(story, film)
        found = [question for question in questions(story, np.random.default_rng(seed)) if question.kind != "when"]
        asked += len(found)
        for carry in ("all", "attention", "random", "recent", Unlike()):
            with engine.open(film, carry=carry) as session:
                session.watch()
                name = carry if isinstance(carry, str) else type(carry).__name__
                right[name] = right.get(name, 0) + sum(session.ask(each.text) == each.answer for each in found)

for name, count in right.items():
    print(f"{name:10} {count} of {asked}")
