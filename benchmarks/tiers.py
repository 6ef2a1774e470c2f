"""What an answer costs as a stream grows, and what it moves: python benchmarks/tiers.py

Two streams of the demo model see the same film of a few minutes again and again. One has no cap, and its answers see
all of it. The other has a cap on memory and a tier on disk, and its answers see the steps that fit the question. Both
are asked at the same moments; the second one twice: with nothing kept from former questions, and once more at once.

Bytes brought in are those that come from blocks; what lies in the newest part of memory is copied too, but not moved.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch

import statekv
from statekv.bench.harness import Circumstances, Row, Setting, append, check_columns
from statekv.cache.tiers.block import SegmentEntry
from statekv.cache.tiers.cache import TieredCache
from statekv.cache.tiers.fetch import BlockFetcher
from statekv.engine.session import Session
from statekv.evals.cards.render import PICTURE, render
from statekv.evals.cards.world import COLORS, FIRST_TEST_SEED, Story, questions, write_story
from statekv.video.frame import Frame

_FIRST_SEED = FIRST_TEST_SEED + 400_000
_FILM_SECONDS = 240
_PER_KIND = 2
_MIB = 1 << 20


class Counted(BlockFetcher):
    """Takes down how many bytes come from blocks."""

    def __init__(self, former: BlockFetcher) -> None:
        super().__init__(former.spec, former.bits)
        self.nbytes = 0

    def bring(self, layer: int, steps: Sequence[SegmentEntry]) -> torch.Tensor:
        found = super().bring(layer, steps)
        self.nbytes += found.nbytes
        return found


@dataclass
class Costs:
    """Of the answers at one moment: seconds, and bytes that they brought in."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    nbytes: dict[str, list[int]] = field(default_factory=dict)

    def take(self, kind: str, session: Session, question: str, counted: Counted | None = None) -> None:
        """Ask once."""
        before = counted.nbytes if counted is not None else 0
        began = time.perf_counter()
        session.ask(question)
        self.seconds.setdefault(kind, []).append(time.perf_counter() - began)
        if counted is not None:
            self.nbytes.setdefault(kind, []).append(counted.nbytes - before)


def a_story() -> Story:
    """One with all cards."""
    stories = (write_story(seed, float(_FILM_SECONDS)) for seed in count(_FIRST_SEED))
    return next(story for story in stories if len(story.cards) == len(COLORS))


def endless(story: Story) -> Iterator[Frame]:
    """The film over and over, one frame a second."""
    pictures = render(story, np.arange(story.duration_seconds), PICTURE).transpose(0, 3, 1, 2)
    frames = torch.from_numpy(pictures.copy())
    return (Frame(frames[second % len(frames)], float(second), 1.0) for second in count())


def tiered(session: Session) -> TieredCache:
    """The cache of a stream with a cap."""
    assert isinstance(session.state.detailed, TieredCache)
    return session.state.detailed


def compare(free: Session, capped: Session, asked: Sequence[str]) -> Costs:
    """Ask both the same."""
    cache, costs = tiered(capped), Costs()
    counted = cache.fetcher
    assert isinstance(counted, Counted)
    for question in asked:
        costs.take("all", free, question)
        counted.recent.clear()
        costs.take("cold", capped, question, counted)
        costs.take("warm", capped, question, counted)
    return costs


def rows_of(session: Session, steps: int, costs: Costs) -> Iterator[Row]:
    """Time and bytes of an answer at one moment; `session` is the one with a cap."""
    config = session.state.config
    caps = {name: value for name in ("memory", "disk") if (value := getattr(config, name)) is not None}
    setting: Setting = {"model": "demo", "budget": config.budget, "steps": steps}
    own = {**setting, "retrieve": config.retrieve, **caps}
    whole = tuple(1e3 * seconds for seconds in costs.seconds["all"])
    yield Row("tiers", "answer, recall=all without a cap", setting, "ms", whole)
    held = {name: f"{nbytes / _MIB:.1f}" for name, nbytes in session.state.nbytes.items()}
    known = f"ratio is to recall=all without a cap; MiB: {held}; {session.state.forgotten} steps forgotten"
    for kind in ("cold", "warm"):
        took = tuple(1e3 * seconds for seconds in costs.seconds[kind])
        yield Row("tiers", f"answer, retrieved, {kind}", own, "ms", took, None, statistics.median(whole), known)
        moved = tuple(nbytes / 1024 for nbytes in costs.nbytes[kind])
        yield Row("tiers", f"brought in from blocks, {kind}", own, "KiB", moved)


def grow(free: Session, capped: Session, frames: Iterator[Frame], lengths: Iterable[int]) -> Iterator[int]:
    """Both streams at each of these lengths, in steps."""
    for length in sorted(lengths):
        entering = list(islice(frames, (length - free.steps) * free.runner.model.frames_per_step))
        for session in (free, capped):
            for frame in entering:
                session.push([frame])
        yield length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[256, 1024, 4096, 16384])
    parser.add_argument("--retrieve", type=int, default=64)
    parser.add_argument("--budget", type=int, default=461)
    parser.add_argument("--memory", default="144MiB", help="good for the representatives of the longest stream")
    parser.add_argument("--disk", default="512MiB")
    parser.add_argument("--csv", type=Path, default=Path("benchmarks/results/tiers.csv"))
    given = parser.parse_args()
    check_columns(given.csv)
    story = a_story()
    asked = [question.text for question in questions(story, np.random.default_rng(0), _PER_KIND)]
    engine = statekv.load("demo", budget=given.budget, max_new_tokens=8, on_horizon="compact")
    caps = {"memory": given.memory, "disk": given.disk, "retrieve": given.retrieve}
    rows: list[Row] = []
    with engine.open() as free, engine.open(method="statekv_retrieve", **caps) as capped:
        cache = tiered(capped)
        cache.fetcher = Counted(cache.fetcher)
        for length in grow(free, capped, endless(story), given.steps):
            rows += rows_of(capped, length, compare(free, capped, asked))
            for row in rows[-5:]:
                print(f"{length} steps, {row.subject}: {row.median:.4g} {row.unit} {row.remark}", flush=True)
    command = shlex.join(["python", "benchmarks/tiers.py", *sys.argv[1:]])
    append(given.csv, rows, Circumstances.here(command, torch.device("cpu")))


if __name__ == "__main__":
    main()
