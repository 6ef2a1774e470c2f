"""What compacted positions cost in accuracy: python benchmarks/positions.py

One film of the demo world, many times as long as the demo model was trained for, runs through one session per way of
living with its horizon. At a few shares of the film every question that its story allows then is asked. The demo model
was trained on clips of up to 224 frames, about 2,020 positions. The film is the first one with all six cards, which
allows the most questions.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

import numpy as np

import statekv
from statekv.engine.session import Session
from statekv.evals.cards.render import write_film
from statekv.evals.cards.world import COLORS, FIRST_TEST_SEED, Story, questions, write_story

_FIRST_SEED = FIRST_TEST_SEED + 300_000
_ENOUGH = 40  # draws of each kind: nearly every question that a story allows


def ask_all(session: Session, story: Story, seconds: float) -> list[bool]:
    """Whether each answer about what has been shown is right; "when" needs words for larger numbers than there are."""
    cards = tuple(card for card in story.cards if card.end_seconds <= seconds)
    if not cards:
        return []
    shown = Story(story.seed, seconds, cards)
    pool = questions(shown, np.random.default_rng(0), _ENOUGH)
    return [session.ask(asked.text).strip() == asked.answer for asked in pool if asked.kind != "when"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=11_200)
    parser.add_argument("--method", default="statekv")
    parser.add_argument("--budget", type=int, default=461)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.75, 1.0])
    parser.add_argument("--ways", nargs="+", default=["error:1000000", "compact:32768", "compact:2816"])
    parser.add_argument("--folder", type=Path, default=Path("statekv-positions"))
    given = parser.parse_args()
    stories = (write_story(seed, float(given.frames)) for seed in itertools.count(_FIRST_SEED))
    story = next(story for story in stories if len(story.cards) == len(COLORS))
    path = given.folder / f"film-{given.frames}.mp4"
    if not path.exists():
        given.folder.mkdir(parents=True, exist_ok=True)
        write_film(story, path)
    print("cards begin at", *(f"{card.start_seconds:.0f}" for card in story.cards), "s")
    engine = statekv.load("demo", given.method, budget=given.budget, max_new_tokens=8)
    for way in given.ways:
        on_horizon, _, horizon = way.partition(":")
        began, told = time.perf_counter(), []
        with engine.open(path, on_horizon=on_horizon, horizon=int(horizon)) as session:
            for share in given.shares:
                session.watch(until_seconds=share * given.frames)
                right = ask_all(session, story, share * given.frames)
                told.append(f"{session.frames} frames {sum(right)}/{len(right)}")
            state, seconds = session.state, session.seconds
            told.append(f"positions {state.position} of {state.horizon}, factor {state.compaction.factor}")
            told.append(f"{seconds.prefill:.0f} s prefill, {seconds.answer:.0f} s answers")
        print(f"{way}: {'; '.join(told)}; {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
