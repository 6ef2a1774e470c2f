"""What is carried, on real weights: text read in steps, and how far the next tokens are from full attention's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from statekv.bench.harness import FULL, Bars, Panel, Row, Setting, read_methods
from statekv.cache.stream import StreamState
from statekv.config import Config
from statekv.errors import ConfigError
from statekv.models.families.text import TextModel
from statekv.runner.runner import ModelRunner

PAPER = "statekv"
# Every control with sinks and without.
METHODS = f"{PAPER},{PAPER}:sinks=4,recency_window,recency_window:sinks=4,random:sinks=0,random,statekv_weighted"
_DRAWS, _LEVEL = 2000, 0.95  # of the bootstrap
_LEAST = 1e-9  # KL: below it float32 tells nothing apart


@dataclass(frozen=True)
class Plan:
    """What to read, and by which rules.

    Attributes:
        tokens: read before the question.
        asked: tokens behind them, over which the answers' distributions are compared.
        step: tokens of a step.
        shares: of `tokens`, in percent, that are carried.
        methods: by their spelling.
    """

    tokens: int = 1024
    asked: int = 128
    step: int = 64
    shares: tuple[float, ...] = (10.0,)
    methods: Mapping[str, Config] = field(default_factory=lambda: read_methods([METHODS]))

    def budget(self, share: float) -> int:
        """Keys carried."""
        return round(self.tokens * share / 100)


@dataclass
class Found:
    """Of one rule, a number for each window.

    Attributes:
        kl: of the distributions from full attention's, a token, in nats.
        alike: share of tokens whose first choice is full attention's.
        loss: of the stream's own next tokens beyond full attention's, in nats.
        seconds: of a step, the median.
    """

    kl: list[float] = field(default_factory=list)
    alike: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def windows_of(
    text: str, tokens: Callable[[str], list[int]], count: int, length: int, choosing: bool = False
) -> list[torch.Tensor]:
    """Windows of so many tokens [1, length], spread evenly over a text.

    Args:
        choosing: those between, which share no token with the others: to choose settings on.

    Raises:
        ConfigError: the text is too short for both halves.
    """
    ids = torch.tensor(tokens(text))
    if len(ids) < 2 * count * length:
        needed = f"{count} windows of {length}, and as many to choose settings on, need {2 * count * length}"
        raise ConfigError(f"the text has {len(ids)} tokens, but {needed}", "give a longer text, or ask for less")
    starts = [number * len(ids) // (2 * count) for number in range(choosing, 2 * count, 2)]
    return [ids[start : start + length][None] for start in starts]


def own_text() -> str:
    """Python's own language reference, as the interpreter brings it along: some 100,000 words."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def read_text(path: Path | None) -> str:
    """A file's text, or `own_text`; a ConfigError where it cannot be read."""
    if path is None:
        return own_text()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        reason = error.strerror.lower() if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(f"{path} cannot be read as text: {reason}", "give a file in UTF-8") from None


def measure(
    model: TextModel, windows: Sequence[torch.Tensor], plan: Plan, name: str, track: Callable[[], object]
) -> list[Row]:
    """Read every window with full attention and by every rule, all rules of a window one after another.

    Args:
        windows: [1, tokens + asked] each.
        name: of the model, for the rows.
        track: called once a window has been read.

    Returns:
        A row for each share and rule, of KLs by window. Its remark has the geometric mean of their ratios to the
        paper's rule with an interval by bootstrap over windows, the same of the stream's loss (of means), the share of
        like first choices, and a step's milliseconds.
    """
    runner = ModelRunner(model)
    found: dict[tuple[float, str], Found] = {}
    for number, ids in enumerate(windows, start=1):
        ids = ids.to(model.model.device)
        whole = _read(runner, Config.of(FULL), ids, plan)
        for share in plan.shares:
            for spelling, config in plan.methods.items():
                read = _read(runner, config.with_(budget=plan.budget(share), seed=number), ids, plan)
                _note(found.setdefault((share, spelling), Found()), read, whole)
        track()
    return [_row(key, found, plan, name) for key in found]


@dataclass(frozen=True)
class _Reading:
    logs: torch.Tensor  # [asked, vocabulary] log probabilities
    loss: float
    seconds: float


@torch.inference_mode()
def _read(runner: ModelRunner, config: Config, ids: torch.Tensor, plan: Plan) -> _Reading:
    model, head = runner.model, runner.model.model.get_output_embeddings()
    assert isinstance(model, TextModel)
    state = runner.open(config, horizon=max(model.trained_length, ids.shape[1] + 1), room=0)
    losses, seconds = [], []
    for start in range(0, plan.tokens, plan.step):
        part = ids[:, start : min(start + plan.step, plan.tokens)]
        began = time.perf_counter()
        hidden = runner.enter(state, model.step(part, start))
        seconds.append(time.perf_counter() - began)
        behind = ids[0, start + 1 : start + part.shape[1] + 1]
        losses.append(torch.nn.functional.cross_entropy(head(hidden[0]).float(), behind, reduction="sum"))
    logs = head(_asked(runner, state, ids[:, plan.tokens : plan.tokens + plan.asked])[0]).float().log_softmax(-1)
    return _Reading(logs, float(sum(losses)) / plan.tokens, float(torch.tensor(seconds).median()))


def _asked(runner: ModelRunner, state: StreamState, ids: torch.Tensor) -> torch.Tensor:
    model = runner.model
    assert isinstance(model, TextModel)
    question = model.asked(ids, state.position)
    state.begin_answer(question.positions)
    return runner.enter(state, question, "answer")


def _note(found: Found, read: _Reading, whole: _Reading) -> None:
    found.kl.append(float((whole.logs.exp() * (whole.logs - read.logs)).sum(-1).mean()))
    found.alike.append(float((whole.logs.argmax(-1) == read.logs.argmax(-1)).float().mean()))
    found.loss.append(read.loss - whole.loss)
    found.seconds.append(read.seconds)


def _row(key: tuple[float, str], found: dict[tuple[float, str], Found], plan: Plan, name: str) -> Row:
    share, spelling = key
    own, paper = found[key], found.get((share, PAPER))
    setting: Setting = {"model": name, "tokens": plan.tokens, "step": plan.step}
    setting |= {"share": f"{share:g} %", "budget": plan.budget(share)}
    told = [f"mean KL {mean(own.kl):.3f}", f"{100 * mean(own.alike):.1f} % alike"]
    told.append(f"step {1000 * mean(own.seconds):.0f} ms")
    if paper is not None and paper is not own:
        low, high = interval(own.kl, paper.kl)
        told[:0] = [f"KL {ratio(own.kl, paper.kl):.2f} × ({low:.2f} … {high:.2f}) the paper's"]
        told[1:1] = [f"loss {mean(own.loss) / mean(paper.loss):.2f} ×"] if mean(paper.loss) else []
    return Row("pretrained", spelling, setting, "KL", tuple(own.kl), remark="; ".join(told))


def mean(values: Sequence[float]) -> float:
    """Arithmetic."""
    return sum(values) / len(values)


def ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """Geometric mean of the ratios, pair by pair."""
    return math.exp(mean(_logs(values, others)))


def interval(values: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """Within which `ratio` lies in 95 % of bootstrap draws over the pairs."""
    low, high = interval_of_mean(_logs(values, others))
    return math.exp(low), math.exp(high)


def interval_of_mean(values: Sequence[float]) -> tuple[float, float]:
    """Within which the mean lies in 95 % of bootstrap draws over the values."""
    known = torch.tensor(values, dtype=torch.float64)
    drawn = torch.randint(len(known), (_DRAWS, len(known)), generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([(1 - _LEVEL) / 2, (1 + _LEVEL) / 2], dtype=torch.float64)
    low, high = known[drawn].mean(1).quantile(ends).tolist()
    return low, high


def _logs(values: Sequence[float], others: Sequence[float]) -> list[float]:
    pairs = [(max(a, _LEAST), max(b, _LEAST)) for a, b in zip(values, others, strict=True)]
    return [math.log(a / b) for a, b in pairs]


def panels(rows: Sequence[Row]) -> list[Panel | Bars]:
    """How many times the paper's KL each method's is, with intervals; for several shares also mean KL against them."""
    papers = {row.setting["share"]: row.samples for row in rows if row.subject == PAPER}
    drawn: list[Panel | Bars] = []
    for share, paper in papers.items():
        beside = {row.subject: row.samples for row in rows if row.setting["share"] == share}
        bars = {name: (ratio(kl, paper), *interval(kl, paper)) for name, kl in beside.items()}
        drawn.append(Bars(f"{share} carried", "KL to full attention ÷ the paper's", bars, mark=1.0))
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        lines.setdefault(row.subject, []).append((float(str(row.setting["share"]).split()[0]), mean(row.samples)))
    if len({row.setting["share"] for row in rows}) > 1:
        drawn.append(Panel("distance from full attention", "carried, %", "KL, nats", lines, log_x=True, log_y=True))
    return drawn
