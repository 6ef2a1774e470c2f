"""Accuracy of the demo model by kind of question, on unseen films: `python -m training.evaluate --frames 32 128`."""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np

from statekv.engine.engine import Engine, load
from statekv.evals.cards.render import write_film
from statekv.evals.cards.world import FIRST_TEST_SEED, KINDS, questions, write_story

# Apart from the films of `statekv demo`, which start at FIRST_TEST_SEED.
_FIRST_SEED = FIRST_TEST_SEED + 100_000


def evaluate(engine: Engine, frames: int, videos: int, per_kind: int) -> dict[str, list[tuple[bool, float]]]:
    """(right, chance) for each question, by kind; full attention, real H.264 files."""
    found: dict[str, list[tuple[bool, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(videos):
            story = write_story(_FIRST_SEED + number, float(frames))
            path = Path(folder) / "film.mp4"
            write_film(story, path)
            with engine.open(path, method="full") as session:
                session.watch()
                for question in questions(story, np.random.default_rng([story.seed, 4]), per_kind):
                    right = session.ask(question.text, max_new_tokens=8).strip() == question.answer
                    found[question.kind].append((right, question.chance))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--frames", type=int, nargs="+", default=[8, 32, 128, 512])
    parser.add_argument("--videos", type=int, default=40)
    parser.add_argument("--per-kind", type=int, default=3)
    args = parser.parse_args()
    engine = load(args.model)
    print("frames  questions  all     " + "".join(f"{kind:>16}" for kind in KINDS) + "   (accuracy / chance)")
    for frames in args.frames:
        found = evaluate(engine, frames, args.videos, args.per_kind)
        every = [row for rows in found.values() for row in rows]
        cells = [found.get(kind, []) for kind in KINDS]
        shown = "".join(f"{_mean(cell, 0):>9.3f} /{_mean(cell, 1):>5.2f}" for cell in cells)
        print(f"{frames:6}  {len(every):9}  {_mean(every, 0):.3f}   {shown}", flush=True)


def _mean(rows: list[tuple[bool, float]], column: int) -> float:
    return float(np.mean([row[column] for row in rows])) if rows else float("nan")


if __name__ == "__main__":
    main()
