"""How much of the carried cache survives scoring with every n-th query: python benchmarks/score_every.py

Films of the demo world run through one session per n, side by side. After each film the tokens that every session
carries are compared with those of n = 1, per layer and KV head. Two sets chosen at random would share budget / tokens.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import statekv
from statekv.cache.carried import CarriedCache
from statekv.engine.session import Session
from statekv.evals.cards.render import write_film
from statekv.evals.cards.world import FIRST_TEST_SEED, write_story


def shared(one: Session, other: Session) -> float:
    """Share of the carried tokens that two streams have in common, mean over layers and heads."""
    shares = []
    first, second = one.state.carried, other.state.carried
    assert isinstance(first, CarriedCache)
    assert isinstance(second, CarriedCache)
    for layer in range(one.state.spec.layers):
        kept, also = first.kept(layer).flatten(0, 1), second.kept(layer).flatten(0, 1)
        for ours, theirs in zip(kept.tolist(), also.tolist(), strict=True):
            shares.append(len(set(ours) & set(theirs)) / len(ours))
    return sum(shares) / len(shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--films", type=int, default=3)
    parser.add_argument("--frames", type=int, default=256)
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--every", type=int, nargs="+", default=[1, 2, 3, 4, 8])
    asked = parser.parse_args()
    engine = statekv.load("demo")
    found: dict[int, list[float]] = {every: [] for every in asked.every}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(asked.films):
            film = Path(folder) / f"{number}.mp4"
            write_film(write_story(FIRST_TEST_SEED + number, float(asked.frames)), film)
            sessions = {every: engine.open(film, budget=asked.budget, score_every=every) for every in {1, *asked.every}}
            for session in sessions.values():
                session.watch()
            for every in asked.every:
                found[every].append(shared(sessions[1], sessions[every]))
            tokens = sessions[1].state.tokens
    print(f"{asked.films} films of {asked.frames} frames, {tokens} tokens, budget {asked.budget}")
    for every, shares in found.items():
        print(f"every {every}: {sum(shares) / len(shares):.3f} of the carried tokens are those of every 1")


if __name__ == "__main__":
    main()
