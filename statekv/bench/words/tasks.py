"""Questions about stories on real weights: how often the right word is likeliest, and how far its odds are from full
attention's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from statekv.bench.harness import FULL, Bars, Row, Setting
from statekv.bench.pretrained import PAPER, Plan, interval, interval_of_mean, mean, ratio
from statekv.bench.words.stories import KINDS, Question, Story
from statekv.cache.stream import StreamState
from statekv.config import Config
from statekv.errors import ConfigError
from statekv.models.families.text import TextModel
from statekv.runner.runner import ModelRunner

TEXT = "text"  # the task that is none of words
_QUESTION = "\n\nQuestion: "

Encode = Callable[[str], list[int]]


def read_tasks(written: str) -> list[str]:
    """`needle,count` → ["needle", "count"]; a ConfigError for one that is not there."""
    found = list(dict.fromkeys(name.strip() for name in written.split(",")))
    for name in found:
        if name not in (TEXT, *KINDS):
            raise ConfigError(f"there is no task {name!r}", f"one of {', '.join((TEXT, *KINDS))}, or some with commas")
    return found


@dataclass
class Found:
    """Of one rule in one kind of question, a number for each story.

    Attributes:
        right: share of questions whose right option was the likeliest.
        kl: of the options' distributions from full attention's, in nats.
        next_kl: the same of all tokens that could come next.
        alike: share of questions whose likeliest option is full attention's.
        seconds: of a step, the median.
    """

    right: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    next_kl: list[float] = field(default_factory=list)
    alike: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Key:
    """What a `Found` is of; full attention has a share of 100."""

    share: float
    method: str
    kind: str


@dataclass(frozen=True)
class Odds:
    """What a question was answered with.

    Attributes:
        options: [options] log probabilities, which sum to 1 over the options.
        nexts: [vocabulary] log probabilities of the next token.
    """

    options: torch.Tensor
    nexts: torch.Tensor


@dataclass(frozen=True)
class Asked:
    """Stories that have been asked about: what was found, and what guessing would get of each kind."""

    found: Mapping[Key, Found]
    guessing: Mapping[str, float]


def measure(
    model: TextModel,
    stories: Sequence[Story],
    plan: Plan,
    kinds: Sequence[str],
    encode: Encode,
    track: Callable[[], object],
) -> Asked:
    """Read every story with full attention and by every rule, and ask its questions where they are due.

    Questions are answered beside the stream, which goes on as if nobody had asked.

    Args:
        kinds: of the questions that are asked.
        track: called once a story has been read.
    """
    runner = ModelRunner(model)
    found: dict[Key, Found] = {}
    for number, story in enumerate(stories, start=1):
        asked = [question for question in story.questions if question.kind in kinds]
        whole, seconds = _read(runner, Config.of(FULL), story, asked, plan, encode)
        _note(found, 100.0, FULL, asked, whole, whole, seconds)
        for share in plan.shares:
            for spelling, config in plan.methods.items():
                config = config.with_(budget=plan.budget(share), seed=number)
                odds, seconds = _read(runner, config, story, asked, plan, encode)
                _note(found, share, spelling, asked, odds, whole, seconds)
        track()
    questions = [question for story in stories for question in story.questions]
    chances = {kind: [1 / len(each.options) for each in questions if each.kind == kind] for kind in kinds}
    return Asked(found, {kind: mean(chances[kind]) for kind in kinds})


@torch.inference_mode()
def _read(
    runner: ModelRunner, config: Config, story: Story, asked: Sequence[Question], plan: Plan, encode: Encode
) -> tuple[list[Odds], float]:
    model = runner.model
    assert isinstance(model, TextModel)
    ids = torch.tensor([story.ids], device=model.model.device)
    longest = max(
        (len(encode(_QUESTION + each.text + " " + word)) for each in asked for word in each.options), default=0
    )
    state = runner.open(config, horizon=max(model.trained_length, ids.shape[1] + longest), room=0)
    found: list[Odds] = []
    seconds: list[float] = []
    for start in range(0, ids.shape[1], plan.step):
        part = ids[:, start : start + plan.step]
        began = time.perf_counter()
        runner.enter(state, model.step(part, start))
        seconds.append(time.perf_counter() - began)
        due = [question for question in asked if question.after == start + part.shape[1]]
        found += [answer(runner, state, question, encode) for question in due]
    return found, float(torch.tensor(seconds).median())


@torch.inference_mode()
def answer(runner: ModelRunner, state: StreamState, question: Question, encode: Encode) -> Odds:
    """How likely each option is; the stream is as before.

    An option of several tokens is as likely as all of them together.
    """
    text = encode(_QUESTION + question.text)
    (nexts,) = _log_probabilities(runner, state, text, 1)
    options = []
    for word in question.options:
        option = encode(" " + word)
        rows = nexts[None]
        if len(option) > 1:
            rows = _log_probabilities(runner, state, text + option[:-1], len(option))
        options.append(rows[torch.arange(len(option)), option].sum())
    return Odds(torch.stack(options).log_softmax(-1), nexts)


def _log_probabilities(runner: ModelRunner, state: StreamState, ids: list[int], rows: int) -> torch.Tensor:
    """[rows, vocabulary] float64: of what comes behind each of a question's last tokens."""
    model, mark = runner.model, state.mark()
    assert isinstance(model, TextModel)
    try:
        segment = model.asked(torch.tensor([ids], device=model.model.device), state.position)
        state.begin_answer(segment.positions)
        hidden = runner.enter(state, segment, "answer")
        logs: torch.Tensor = model.model.get_output_embeddings()(hidden[0, -rows:]).double().log_softmax(-1)
        return logs
    finally:
        state.crop_to(mark)


def _note(
    found: dict[Key, Found],
    share: float,
    method: str,
    asked: Sequence[Question],
    odds: Sequence[Odds],
    whole: Sequence[Odds],
    seconds: float,
) -> None:
    """Means over a story's questions, kind by kind; a story without any of a kind is left out there."""
    for kind in dict.fromkeys(question.kind for question in asked):
        here = [number for number, question in enumerate(asked) if question.kind == kind]
        of = found.setdefault(Key(share, method, kind), Found())
        of.right.append(mean([float(odds[n].options.argmax() == asked[n].right) for n in here]))
        of.alike.append(mean([float(odds[n].options.argmax() == whole[n].options.argmax()) for n in here]))
        of.kl.append(mean([_kl(whole[n].options, odds[n].options) for n in here]))
        of.next_kl.append(mean([_kl(whole[n].nexts, odds[n].nexts) for n in here]))
        of.seconds.append(seconds)


def _kl(whole: torch.Tensor, other: torch.Tensor) -> float:
    return float((whole.exp() * (whole - other)).sum())


def rows(asked: Asked, plan: Plan, name: str) -> list[Row]:
    """A row for each kind, share and rule, of the options' KLs by story; its remark says how many were right, with an
    interval by bootstrap over stories, and what else was found.

    Args:
        name: of the model.
    """
    order = sorted(asked.found, key=lambda key: (KINDS.index(key.kind), key.method != FULL))
    return [_row(key, asked, plan, name) for key in order]


def _row(key: Key, asked: Asked, plan: Plan, name: str) -> Row:
    own, paper = asked.found[key], asked.found.get(Key(key.share, PAPER, key.kind))
    whole = key.method == FULL
    setting: Setting = {"model": name, "task": key.kind, "tokens": plan.tokens, "step": plan.step}
    setting |= {"share": f"{key.share:g} %", "budget": plan.tokens if whole else plan.budget(key.share)}
    low, high = interval_of_mean(own.right)
    told = [f"{100 * mean(own.right):.1f} % right ({100 * low:.1f} … {100 * high:.1f})"]
    if whole:
        told.append(f"guessing {100 * asked.guessing[key.kind]:.1f} %")
    else:
        told += [f"{100 * mean(own.alike):.1f} % alike", f"mean KL {mean(own.kl):.3f}"]
        told.append(f"of next tokens {mean(own.next_kl):.3f}")
    if paper is not None and paper is not own:
        low, high = interval(own.kl, paper.kl)
        told.append(f"{ratio(own.kl, paper.kl):.2f} × ({low:.2f} … {high:.2f}) the paper's")
    told.append(f"step {1000 * mean(own.seconds):.0f} ms")
    return Row("pretrained", key.method, setting, "KL", tuple(own.kl), remark="; ".join(told))


def panels(asked: Asked) -> list[Bars]:
    """For each kind and share two: how many were right, held against guessing, and the options' mean KL."""
    found = []
    for kind, chance in asked.guessing.items():
        whole = asked.found[Key(100.0, FULL, kind)]
        for share in sorted({key.share for key in asked.found if key.method != FULL}):
            beside = {key.method: of for key, of in asked.found.items() if (key.share, key.kind) == (share, kind)}
            right = {name: _bar([100 * each for each in of.right]) for name, of in ({FULL: whole} | beside).items()}
            far = {name: _bar(of.kl) for name, of in beside.items() if name != FULL}
            found.append(Bars(f"{kind}, {share:g} % carried", "right, %; line: guessing", right, mark=100 * chance))
            found.append(Bars(f"{kind}, {share:g} % carried", "KL of the options, nats", far, mark=0.0))
    return found


def _bar(values: Sequence[float]) -> tuple[float, float, float]:
    return mean(values), *interval_of_mean(values)
