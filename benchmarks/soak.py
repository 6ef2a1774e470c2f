"""A stream that is far longer than its memory, watched from outside: python benchmarks/soak.py

The demo model sees a film of a few minutes again and again, with true times, and is asked the same few questions every
so many steps. What is taken down then is what the system says of the process: resident memory beyond that of the loaded
model, open files, threads. Time per step and per answer is compared between the second and the last hundredth of the
stream. Answers are not judged, for a film that repeats itself has no one story.

The loaded model is one that has seen a few frames without a cap and has answered about them, so that whatever torch
sets up once counts as the model's. What that stream has left behind as free memory does not: it is given back to the
system, and a much shorter stream takes what a step and an answer need to work in.

A machine whose speed changes from minute to minute would say more about itself than about the stream. So in turns with
its steps and answers, those of a still stream are timed: forks of a short one, which never grows. Ratios are given as
they are, and divided by that of the still stream.

glibc moves the size from which on it asks the system for memory of its own, and gives it back, as it goes; holes that
stay behind take some MiB. MALLOC_MMAP_THRESHOLD_=131072 in the environment holds it where it was.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import os
import shlex
import statistics
import sys
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch

import statekv
from statekv.bench.harness import Circumstances, Row, append, check_columns
from statekv.config import Config
from statekv.engine.session import Session
from statekv.evals.cards.render import PICTURE, render
from statekv.evals.cards.world import COLORS, FIRST_TEST_SEED, Story, questions, write_story
from statekv.video.frame import Frame

_FIRST_SEED = FIRST_TEST_SEED + 400_000
_FILM_SECONDS = 240
_QUESTIONS = 5  # of different kinds; one alone would find what it needs where it left it
_STILL = 64  # steps: as many as an answer sees
_STILL_STEPS = (1, 5)  # of a fork: the first ones copy what is shared; the others are timed
_STILL_EVERY = 50  # steps
_WARM = (64, 8)  # frames; the first are more than the carried cache holds
_MIB = 1 << 20
_MALLOC = "MALLOC_MMAP_THRESHOLD_"


@dataclass(frozen=True)
class Moment:
    """What there was to see after so many steps."""

    step: int
    resident: int  # bytes beyond those of the loaded model
    files: int
    threads: int
    forgotten: int
    tiers: dict[str, int]  # bytes, as the stream counts them
    answers: list[float]  # seconds
    still_steps: list[float]  # seconds, since the last moment
    still_answers: list[float]


def filmed(story: Story) -> torch.Tensor:
    """[seconds, 3, H, W] uint8."""
    pictures = render(story, np.arange(story.duration_seconds), PICTURE).transpose(0, 3, 1, 2)
    return torch.from_numpy(pictures.copy())


def endless(frames: torch.Tensor) -> Iterator[Frame]:
    """The film over and over, one frame a second."""
    return (Frame(frames[second % len(frames)], float(second), 1.0) for second in count())


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def ask_each(session: Session, asked: list[str]) -> list[float]:
    """Seconds of each answer."""
    took = []
    for text in asked:
        began = time.perf_counter()
        session.ask(text)
        took.append(time.perf_counter() - began)
    return took


class Still:
    """A short stream without a cap, whose forks are always of one length.

    Args:
        session: the stream.
        frames: what it sees.
    """

    def __init__(self, session: Session, frames: Iterator[Frame]) -> None:
        self.session = session
        per_step = session.runner.model.frames_per_step
        session.push(islice(frames, _STILL * per_step))
        self._next = [list(islice(frames, per_step)) for _ in range(sum(_STILL_STEPS))]
        self.steps: list[float] = []

    def step(self) -> None:
        """Take down what a few steps take."""
        with self.session.fork() as fork:
            took = [seconds_of(fork, entering) for entering in self._next]
        self.steps += took[_STILL_STEPS[0] :]

    def taken(self) -> list[float]:
        """Seconds of all steps since the last time."""
        found, self.steps = self.steps, []
        return found


def seconds_of(session: Session, entering: list[Frame]) -> float:
    """What a step takes."""
    began = time.perf_counter()
    session.push(entering)
    return time.perf_counter() - began


def look(session: Session, still: Still, asked: list[str], loaded: int) -> Moment:
    """Ask, and take down what there is."""
    answers, still_answers = [], []
    for question in asked:
        answers += ask_each(session, [question])
        still_answers += ask_each(still.session, [question])
    return Moment(
        session.steps,
        resident_bytes() - loaded,
        len(os.listdir("/proc/self/fd")),
        len(os.listdir("/proc/self/task")),
        session.state.forgotten,
        session.state.nbytes,
        answers,
        still.taken(),
        still_answers,
    )


def soak(
    session: Session,
    still: Still,
    frames: Iterator[Frame],
    asked: list[str],
    every: int,
    took: array[float],
    loaded: int,
    until: float = math.inf,
) -> list[Moment]:
    """Run the stream: as many steps as `commit` has places for their seconds, or up to a question behind a time."""
    moments: list[Moment] = []
    for step in range(len(took)):
        entering = [next(frames) for _ in range(session.runner.model.frames_per_step)]
        took[step] = seconds_of(session, entering)
        if (step + 1) % _STILL_EVERY == 0:
            still.step()
        if (step + 1) % every == 0:
            moments.append(look(session, still, asked, loaded))
            tell(moments[-1], took[step + 1 - every : step + 1])
            if time.perf_counter() > until:
                break
    return moments


def tell(moment: Moment, took: array[float]) -> None:
    """One line on what a moment has shown, and the steps before it."""
    tiers = ", ".join(f"{name} {held / _MIB:.1f}" for name, held in moment.tiers.items())
    print(
        f"{moment.step} steps: {1e3 * statistics.median(took):.2f} ms a step "
        f"(still {1e3 * statistics.median(moment.still_steps):.2f}), "
        f"{1e3 * statistics.median(moment.answers):.1f} ms an answer "
        f"(still {1e3 * statistics.median(moment.still_answers):.1f}), {moment.resident / _MIB:.1f} MiB ({tiers}), "
        f"{moment.files} files, {moment.threads} threads, {moment.forgotten} forgotten",
        flush=True,
    )


def milliseconds(moments: list[Moment], name: str) -> list[float]:
    """All that was timed at some moments."""
    return [1e3 * seconds for moment in moments for seconds in getattr(moment, name)]


def rows_of(config: Config, moments: list[Moment], took: array[float], every: int) -> Iterator[Row]:
    """What the second and the last hundredth cost, and what there was throughout."""
    steps, hundredth = len(took), max(len(took) // 100, every)  # more where a run ended sooner
    names = ("carry", "recall", "budget", "retrieve", "memory", "host_memory", "disk", "bits")
    chosen = {name: value for name in names if (value := getattr(config, name)) is not None}
    setting = {"model": "demo", "steps": steps, **chosen}
    if _MALLOC in os.environ:
        setting[_MALLOC] = os.environ[_MALLOC]
    early, late = (
        [moment for moment in moments if first < moment.step <= last]
        for first, last in ((hundredth, 2 * hundredth), (steps - hundredth, steps))
    )
    early_steps, late_steps = (1e3 * np.array(part) for part in (took[hundredth : 2 * hundredth], took[-hundredth:]))
    early_answers, late_answers = (np.array(milliseconds(part, "answers")) for part in (early, late))
    for subject, before, after, still in (
        ("a step", early_steps, late_steps, "still_steps"),
        ("an answer", early_answers, late_answers, "still_answers"),
    ):
        drift = statistics.median(milliseconds(late, still)) / statistics.median(milliseconds(early, still))
        ratio = float(np.median(after) / np.median(before))
        told = (
            f"of the last {hundredth} steps; ratio is to the second {hundredth}; the still stream's is {drift:.3f}, so "
            f"beside it {ratio / drift:.3f}; means {after.mean():.2f} and {before.mean():.2f}"
        )
        yield Row("soak", subject, setting, "ms", tuple(after), None, float(np.median(before)), told)
    cap = sum(held for held in (config.memory, config.host_memory) if isinstance(held, int)) / _MIB
    resident = tuple(moment.resident / _MIB for moment in moments)
    told = f"{max(resident):.1f} at most; floor is the cap; {moments[-1].forgotten} steps forgotten"
    yield Row("soak", "resident beyond the model", setting, "MiB", resident, cap, remark=told)
    files, threads = ([float(getattr(moment, name)) for moment in moments] for name in ("files", "threads"))
    for subject, found in (("open files", files), ("threads", threads)):
        told = f"{found[0]:.0f} at the first question, {max(found):.0f} at most"
        yield Row("soak", subject, setting, "", tuple(found), remark=told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop sooner, at the first question after them")
    parser.add_argument("--every", type=int, default=1_000, help="steps between questions")
    parser.add_argument("--method", default="statekv_retrieve")
    parser.add_argument("--budget", type=int, default=461)
    parser.add_argument("--memory", default="64MiB")
    parser.add_argument("--host-memory")
    parser.add_argument("--disk")
    parser.add_argument("--disk-folder")
    parser.add_argument("--bits", type=int)
    parser.add_argument("--csv", type=Path, default=Path("benchmarks/results/soak.csv"))
    given = parser.parse_args()
    if given.steps // 100 < given.every:
        parser.error(f"--every {given.every} leaves no question in one of 100 parts of {given.steps} steps")
    if given.every < _STILL_EVERY:
        parser.error(f"--every {given.every} is too often: the still stream steps every {_STILL_EVERY}")
    check_columns(given.csv)
    story = next(
        story
        for story in (write_story(seed, float(_FILM_SECONDS)) for seed in count(_FIRST_SEED))
        if len(story.cards) == len(COLORS)
    )
    asked = [question.text for question in questions(story, np.random.default_rng(0))][:_QUESTIONS]
    engine = statekv.load("demo", given.method, budget=given.budget, max_new_tokens=8)
    film = filmed(story)
    for enough in _WARM:
        ctypes.CDLL(None).malloc_trim(0)
        with engine.open() as warm:
            warm.push(islice(endless(film), enough))
            ask_each(warm, asked)
        del warm
        gc.collect()
    frames, took = endless(film), array("d", bytes(8 * given.steps))
    caps = {name: getattr(given, name) for name in ("memory", "host_memory", "disk", "disk_folder", "bits")}
    with engine.open() as short:
        still = Still(short, endless(film))
        still.step()
        ask_each(short, asked)
        still.taken()
        loaded = resident_bytes()
        until = time.perf_counter() + 60 * given.minutes
        with engine.open(on_horizon="compact", **caps) as session:
            moments = soak(session, still, frames, asked, given.every, took, loaded, until)
            config = session.state.config
    rows = list(rows_of(config, moments, took[: moments[-1].step], given.every))
    command = shlex.join(["python", "benchmarks/soak.py", *sys.argv[1:]])
    append(given.csv, rows, Circumstances.here(command, torch.device("cpu")))
    for row in rows:
        print(f"{row.subject}: {row.median:.4g} {row.unit}; ratio {row.ratio}, distance {row.distance}; {row.remark}")


if __name__ == "__main__":
    main()
