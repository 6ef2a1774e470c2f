"""Rules of who stays, side by side at equal budgets: python benchmarks/carry_rules.py

Films of the demo world run through one session per rule and budget; the vision tower looks at each frame once for all
of them, and all get the same questions. For each: accuracy, agreement with the answers of full attention, KL(full ‖
rule) of the first answer token, and the difference of accuracy and KL to the paper's rule at the same budget, with a
95 % interval from resampling films. The rules were chosen before the first run.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import statekv
from statekv.demo.film import write_film
from statekv.demo.world import FIRST_TEST_SEED, Question, questions, write_story
from statekv.session import Session
from statekv.video.reader import read_frames

FULL, PAPER = "full", "paper"
RULES: dict[str, dict[str, Any]] = {
    PAPER: {},
    "decay 0.5": {"decay": 0.5},
    "decay 0.9": {"decay": 0.9},
    "decay 1": {"decay": 1},
    "value norms": {"value_norms": True},
    "slope 0.5": {"layer_slope": 0.5},
    "slope -0.5": {"layer_slope": -0.5},
    "newest 8": {"pin_newest": 8},
    "coverage 0.25": {"coverage": 0.25},
    "coverage 0.5": {"coverage": 0.5},
    "decay 0.9, coverage 0.25": {"decay": 0.9, "coverage": 0.25},
    "random": {"carry": "random"},
}
Name = tuple[str, float]  # rule, share of the tokens that it may carry


@dataclass(frozen=True)
class Answer:
    """What one rule said to one question of one film; `kl` in nats."""

    film: int
    right: bool
    agrees: bool
    kl: float


def watch(film: Path, sessions: dict[Name, Session]) -> None:
    """Let every session see the whole film, which is encoded once."""
    first = sessions[FULL, 1.0]
    model, stepper = first.stepper.model, first.stepper
    with torch.inference_mode():
        for frame in read_frames(film, fps=1.0, ahead=8):
            (seen,) = model.look([[frame]])
            entering = model.enter(seen, first.state)
            for session in sessions.values():
                for segment in entering:
                    stepper.prefill(session.state, segment)


def ask(film: int, question: Question, sessions: dict[Name, Session]) -> dict[Name, Answer]:
    """One question to every session."""
    expected = sessions[FULL, 1.0].logits(question.text).log_softmax(-1)
    said = {name: session.ask(question.text, max_new_tokens=8).strip() for name, session in sessions.items()}
    found = {}
    for name, session in sessions.items():
        own = session.logits(question.text).log_softmax(-1)
        kl = float((expected.exp() * (expected - own)).sum())
        found[name] = Answer(film, said[name] == question.answer, said[name] == said[FULL, 1.0], kl)
    return found


def interval(ours: list[Answer], theirs: list[Answer], value: Callable[[Answer], float]) -> str:
    """Mean difference over the same questions, with 95 % of what resampled films give."""
    films = sorted({answer.film for answer in ours})
    by_film = [[value(a) - value(b) for a, b in zip(ours, theirs, strict=True) if a.film == film] for film in films]
    sums, counts = np.array([[sum(film), len(film)] for film in by_film]).T
    drawn = np.random.default_rng(0).integers(len(films), size=(4000, len(films)))
    low, high = np.quantile(sums[drawn].sum(1) / counts[drawn].sum(1), [0.025, 0.975])
    return f"{sums.sum() / counts.sum():+.3f} [{low:+.3f} {high:+.3f}]"


def table(answers: dict[Name, list[Answer]]) -> None:
    """Print a row per rule and budget."""
    print(f"{'rule':26} {'carried':>7} {'right':>6} {'agrees':>6} {'KL':>6}  {'right − paper':24} KL − paper")
    for (rule, share), own in answers.items():
        right, agrees, kl = (np.mean([getattr(a, name) for a in own]) for name in ("right", "agrees", "kl"))
        line = f"{rule:26} {share:7.0%} {right:6.3f} {agrees:6.3f} {kl:6.3f}"
        if rule not in (FULL, PAPER):
            paper = answers[PAPER, share]
            told = interval(own, paper, lambda a: float(a.right)), interval(own, paper, lambda a: a.kl)
            line += f"  {told[0]:24} {told[1]}"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--films", type=int, default=8)
    parser.add_argument("--frames", type=int, default=512)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.05, 0.10], help="of the film's tokens")
    parser.add_argument("--per-kind", type=int, default=6, help="questions of each kind and film, where it has so many")
    asked = parser.parse_args()
    answers: dict[Name, list[Answer]] = {}
    with tempfile.TemporaryDirectory() as folder, suppress(KeyboardInterrupt):  # Ctrl-C: what there is so far
        run(asked, Path(folder), answers)
    table(answers)


def run(asked: argparse.Namespace, folder: Path, answers: dict[Name, list[Answer]]) -> None:
    """Put every film's answers to those that there are."""
    engine = statekv.load("demo")
    for number in range(asked.films):
        story = write_story(FIRST_TEST_SEED + number, float(asked.frames))
        film = folder / f"{number}.mp4"
        write_film(story, film)
        tokens = 9 * asked.frames  # of the pictures; the prompt's few do not count
        sessions = {(FULL, 1.0): engine.open(method="full")}
        for share in asked.shares:
            for rule, settings in RULES.items():
                sessions[rule, share] = engine.open(budget=round(share * tokens), **settings)
        watch(film, sessions)
        for question in questions(story, np.random.default_rng([story.seed, 3]), asked.per_kind):
            for name, answer in ask(number, question, sessions).items():
                answers.setdefault(name, []).append(answer)
        for session in sessions.values():
            session.close()
        print(f"film {number + 1} of {asked.films}: {len(answers[FULL, 1.0])} questions so far", flush=True)


if __name__ == "__main__":
    main()
