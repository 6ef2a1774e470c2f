"""A stream that is far longer than its memory, watched from outside: python benchmarks/soak.py

The demo model sees a film of a few minutes again and again, with true times, and is asked the same few questions every
so many steps. What is taken down then is what the system says of the process: resident memory beyond that of the loaded
model, open files, threads. Time per step and per answer is compared between the second and the last hundredth of the
stream. Answers are not judged, for a film that repeats itself has no one story.

The loaded model is one that has seen a few frames without a cap and has answered about them, so that whatever torch
sets up once counts as the model's. What that stream has left behind as free memory does not: it is given back to the
system, and a much shorter stream takes what a step and an answer need to work in.

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
from statekv.bench.rows import Circumstances, Row, append, check_columns
from statekv.config import Config
from statekv.demo.film import PICTURE
from statekv.demo.render import render
from statekv.demo.world import COLORS, FIRST_TEST_SEED, Story, questions, write_story
from statekv.session import Session
from statekv.video.frame import Frame

_FIRST_SEED = FIRST_TEST_SEED + 400_000
_FILM_SECONDS = 240
_QUESTIONS = 5  # of different kinds; one alone would find what it needs where it left it
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


def look(session: Session, asked: list[str], loaded: int) -> Moment:
    """Ask, and take down what there is."""
    answers = ask_each(session, asked)
    return Moment(
        session.steps,
        resident_bytes() - loaded,
        len(os.listdir("/proc/self/fd")),
        len(os.listdir("/proc/self/task")),
        session.state.forgotten,
        session.state.nbytes,
        answers,
    )


def soak(
    session: Session,
    frames: Iterator[Frame],
    asked: list[str],
    every: int,
    took: array[float],
    loaded: int,
    until: float = math.inf,
) -> list[Moment]:
    """Run the stream: as many steps as `took` has places for their seconds, or up to a question behind a time."""
    moments: list[Moment] = []
    for step in range(len(took)):
        entering = [next(frames) for _ in range(session.stepper.model.frames_per_step)]
        began = time.perf_counter()
        session.push(entering)
        took[step] = time.perf_counter() - began
        if (step + 1) % every == 0:
            moments.append(look(session, asked, loaded))
            tell(moments[-1], took[step + 1 - every : step + 1])
            if time.perf_counter() > until:
                break
    return moments


def tell(moment: Moment, took: array[float]) -> None:
    """One line on what a moment has shown, and the steps before it."""
    tiers = ", ".join(f"{name} {held / _MIB:.1f}" for name, held in moment.tiers.items())
    print(
        f"{moment.step} steps: {1e3 * statistics.median(took):.2f} ms a step, "
        f"{1e3 * statistics.median(moment.answers):.1f} ms an answer, {moment.resident / _MIB:.1f} MiB ({tiers}), "
        f"{moment.files} files, {moment.threads} threads, {moment.forgotten} forgotten",
        flush=True,
    )


def rows_of(config: Config, moments: list[Moment], took: array[float], every: int) -> Iterator[Row]:
    """What the second and the last hundredth cost, and what there was throughout."""
    steps, hundredth = len(took), max(len(took) // 100, every)  # more where a run ended sooner
    names = ("carry", "recall", "budget", "retrieve", "memory", "host_memory", "disk", "bits")
    chosen = {name: value for name in names if (value := getattr(config, name)) is not None}
    setting = {"model": "demo", "steps": steps, **chosen}
    if _MALLOC in os.environ:
        setting[_MALLOC] = os.environ[_MALLOC]
    early, late = (
        [1e3 * seconds for moment in moments if first < moment.step <= last for seconds in moment.answers]
        for first, last in ((hundredth, 2 * hundredth), (steps - hundredth, steps))
    )
    early_steps, late_steps = (1e3 * np.array(part) for part in (took[hundredth : 2 * hundredth], took[-hundredth:]))
    against = f"of the last {hundredth} steps; ratio is to the second {hundredth}"
    means = f"{against}; means {late_steps.mean():.2f} and {early_steps.mean():.2f}"
    yield Row("soak", "a step", setting, "ms", tuple(late_steps), None, float(np.median(early_steps)), means)
    yield Row("soak", "an answer", setting, "ms", tuple(late), None, statistics.median(early), against)
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
    loaded = resident_bytes()
    with engine.open(on_horizon="compact", **caps) as session:
        until = time.perf_counter() + 60 * given.minutes
        moments = soak(session, frames, asked, given.every, took, loaded, until)
        rows = list(rows_of(session.state.config, moments, took[: moments[-1].step], given.every))
    command = shlex.join(["python", "benchmarks/soak.py", *sys.argv[1:]])
    append(given.csv, rows, Circumstances.here(command, torch.device("cpu")))
    for row in rows:
        print(f"{row.subject}: {row.median:.4g} {row.unit}; ratio {row.ratio}, distance {row.distance}; {row.remark}")


if __name__ == "__main__":
    main()
