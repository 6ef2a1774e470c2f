"""Timing candidates in turns, the machine they ran on, their rows in a CSV file, their picture."""

from __future__ import annotations

import csv
import datetime
import io
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from statekv.config import Config
from statekv.config.spelling import read_method, split_methods
from statekv.errors import ConfigError, OutputError, writing
from statekv.models.loading import read_device, read_dtype

Setting = dict[str, str | int | float]
FULL = "full"  # the method that others are held against

_PACKAGES = ("statekv", "torch", "transformers", "triton", "flash-attn")


@dataclass(frozen=True)
class Row:
    """One measured thing.

    Attributes:
        bench: the sub-command.
        subject: what was measured: an implementation, a method.
        setting: what it was measured at, such as model, budget, step.
        unit: of samples and floor, such as ms.
        samples: every measurement; none where it could not be measured, and the remark says why.
        floor: the least that the machine allows; None where there is no such thing.
        reference: median, in the same run, of what people would use instead.
        remark: what a reader of the figures must know.
    """

    bench: str
    subject: str
    setting: Setting
    unit: str
    samples: tuple[float, ...]
    floor: float | None = None
    reference: float | None = None
    remark: str = ""

    def quantile(self, share: float) -> float:
        """The sample below which `share` of them lie, interpolated; not a number without samples."""
        if not self.samples:
            return math.nan
        return float(torch.tensor(self.samples, dtype=torch.float64).quantile(share))

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    @property
    def distance(self) -> float | None:
        """How many times the floor the median is."""
        return self.median / self.floor if self.floor and self.samples else None

    @property
    def ratio(self) -> float | None:
        """How many times the reference the median is."""
        return self.median / self.reference if self.reference and self.samples else None


@dataclass(frozen=True)
class Circumstances:
    """Where, when and with what rows were measured."""

    command: str
    device: str
    threads: int
    versions: str
    commit: str
    date: str

    @classmethod
    def here(cls, command: str, device: torch.device) -> Circumstances:
        """This machine, now."""
        command = command.encode(errors="backslashreplace").decode()  # names of files need not be UTF-8
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        return cls(command, device_name(device), torch.get_num_threads(), _versions(), _commit(), today)


def append(path: Path, rows: Iterable[Row], circumstances: Circumstances) -> None:
    """Add rows to a CSV file, with a header where it is new; a ConfigError where it has other columns, an OutputError
    where it cannot be written: then none of them is in it.
    """
    check_columns(path)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if not path.exists() or path.stat().st_size == 0:
        writer.writerow(_HEADER)
    writer.writerows(_cells(told(row, circumstances)) for row in rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _append_whole(path, text.getvalue().encode())
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}", "make room, or name another file") from None


def _append_whole(path: Path, data: bytes) -> None:
    """All of it or nothing: half a row would spoil the next one."""
    with path.open("ab") as file:
        before = file.tell()
        try:
            file.write(data)
            file.flush()
        except OSError:
            os.truncate(path, before)
            raise


def check_columns(path: Path) -> None:
    """Raise a ConfigError if a file is there and is not a benchmark's."""
    if not path.exists():
        return
    header = ",".join(_HEADER)
    with path.open(encoding="utf-8", errors="replace") as file:
        first = file.readline(len(header) + 1).rstrip("\n")  # no more: it may have no end
    if first and first != header:
        raise ConfigError(f"{path} does not begin with the columns of a benchmark", "give another file")


_OF_THE_RUN = ("device", "threads", "versions", "commit", "date", "command")
_HEADER = (
    *("bench", "subject", "setting", "unit", "p20", "p50", "p80", "runs", "floor", "distance", "ratio", "remark"),
    *_OF_THE_RUN,
)


def told(row: Row, at: Circumstances) -> dict[str, Any]:
    """A row and where it was measured by the names of the file's columns; None where there is no such figure."""
    p20, p50, p80 = (row.quantile(share) if row.samples else None for share in (0.2, 0.5, 0.8))
    figures = {"p20": p20, "p50": p50, "p80": p80, "runs": len(row.samples)}
    limits = {"floor": row.floor, "distance": row.distance, "ratio": row.ratio, "remark": row.remark}
    measured = {"bench": row.bench, "subject": row.subject, "setting": row.setting, "unit": row.unit}
    return measured | figures | limits | {name: getattr(at, name) for name in _OF_THE_RUN}


def _cells(found: Mapping[str, Any]) -> list[str | int]:
    return [_cell(found[name]) for name in _HEADER]


def _cell(value: Any) -> str | int:
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, (str, int)):
        return value
    return "" if value is None else f"{value:.6g}"


def device_name(device: torch.device) -> str:
    """The accelerator's or the processor's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _versions() -> str:
    found = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return " ".join([f"python {platform.python_version()}", *found])


def _commit() -> str:
    """The commit of the source tree, with a + where it has been changed; empty outside of one."""
    ours, head = ("ls-files", "--error-unmatch", __file__), ("describe", "--always", "--dirty=+", "--exclude=*")
    try:
        told = [
            subprocess.run(["git", *asked], cwd=Path(__file__).parent, capture_output=True, text=True)
            for asked in (ours, head)
        ]
    except OSError:
        return ""
    return "" if any(answer.returncode for answer in told) else told[-1].stdout.strip()


def alternate(
    candidates: Mapping[str, Callable[[], object]], *, runs: int, device: torch.device, warm: int = 2
) -> dict[str, list[float]]:
    """Time `runs` calls of each candidate in turn, after `warm` untimed ones, so that a slow moment of the machine
    falls on all of them alike; what they return is thrown away.

    Args:
        device: waited for before and after each call.

    Returns:
        Seconds of each timed call, by name, in order.
    """
    for call in candidates.values():
        for _ in range(warm):
            call()
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(runs):
        for name, call in candidates.items():
            wait(device)
            began = time.perf_counter()
            call()
            wait(device)
            found[name].append(time.perf_counter() - began)
    return found


def milliseconds(seconds: Iterable[float]) -> tuple[float, ...]:
    """Samples of a row."""
    return tuple(1000 * second for second in seconds)


def wait(device: torch.device) -> None:
    """Until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


_WIDTH = 4096  # of a weight that no cache holds


@torch.inference_mode()
def large_product(device: torch.device, dtype: torch.dtype, rows: int = 256) -> Callable[[], object]:
    """What multiplies `rows` random activations with one large weight."""
    left = torch.randn(rows, _WIDTH, device=device, dtype=dtype)
    right = torch.randn(_WIDTH, _WIDTH, device=device, dtype=dtype)
    return lambda: left @ right


def best_rate(seconds: Iterable[float], rows: int = 256) -> float:
    """FLOP/s of `large_product` from its timed calls: of the best, for a floor is a floor."""
    return 2 * rows * _WIDTH**2 / min(seconds)


def matmul_rate(device: torch.device, dtype: torch.dtype, rows: int = 256, runs: int = 10) -> float:
    """FLOP/s of products of `rows` activations with a large weight, measured now."""
    product = large_product(device, dtype, rows)
    return best_rate(alternate({"product": product}, runs=runs, device=device)["product"], rows)


def alternate_within(
    candidates: Mapping[str, Callable[[], object]], *, runs: int, seconds: float, device: torch.device
) -> dict[str, list[float]]:
    """As `alternate`, with a limit to the `seconds` that one candidate takes in all: a slow one gets fewer turns, one
    at least, spread over the rounds.
    """
    # The first call may compile and record: where there is time, a second one says how long it really takes.
    took = alternate(candidates, runs=1, device=device, warm=0)
    quick = {name: call for name, call in candidates.items() if 2 * took[name][0] <= seconds}
    took |= alternate(quick, runs=1, device=device, warm=0)
    turns = {name: turns_within(seconds, once, runs) for name, (once,) in took.items()}
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(runs):
        due = {name: call for name, call in candidates.items() if is_due(number, turns[name], runs)}
        for name, timed in alternate(due, runs=1, device=device, warm=0).items():
            found[name] += timed
    return found


def turns_within(seconds: float, once: float, most: int) -> int:
    """How many calls of `once` seconds fit, from 1 to `most`."""
    return max(1, min(most, int(seconds / once)))


def is_due(number: int, turns: int, rounds: int) -> bool:
    """Whether a candidate with `turns` turns in `rounds` rounds has one in round `number`, counted from 0."""
    return (number + 1) * turns // rounds > number * turns // rounds


def place(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """A device that is there and a dtype. `auto` takes CUDA where there is one, and bfloat16 on it, else the CPU and
    float32.

    Raises:
        ConfigError: an unknown dtype, or a device that is not there.
    """
    found, kind = read_device(device), read_dtype(dtype)
    if not isinstance(kind, torch.dtype):
        kind = torch.bfloat16 if found.type == "cuda" else torch.float32
    return found, kind


_PANELS_A_ROW = 4
_INCHES = (3.6, 3.0)  # of a panel


@dataclass(frozen=True)
class Panel:
    """One system of axes with a title, and x and y named with their units.

    Attributes:
        lines: points (x, y) by name; the same name has the same colour in all panels.
        log_x, log_y: logarithmic axes; a linear one starts at 0.
    """

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    log_x: bool = False
    log_y: bool = False

    def draw(self, axes: Any, colours: Mapping[str, str]) -> dict[str, Any]:
        """Draw the lines; what the legend shows of each."""
        handles = {}
        for name, points in self.lines.items():
            (handles[name],) = axes.plot(*zip(*points, strict=True), marker=".", color=colours[name])
        axes.set(xlabel=self.x, ylabel=self.y)
        axes.set_xscale("log", base=2) if self.log_x else axes.set_xlim(left=0)
        axes.set_yscale("log") if self.log_y else axes.set_ylim(bottom=0)
        return handles


@dataclass(frozen=True)
class Bars:
    """One system of axes with a bar for each name, and x named with its unit.

    Attributes:
        lines: value, and the ends of its interval, by name.
        mark: a value that bars are held against.
    """

    title: str
    x: str
    lines: Mapping[str, tuple[float, float, float]]
    mark: float

    def draw(self, axes: Any, colours: Mapping[str, str]) -> dict[str, Any]:
        """Draw the bars, the first one on top; no legend is needed."""
        names = list(self.lines)[::-1]
        values, lows, highs = zip(*(self.lines[name] for name in names), strict=True)
        spread = [[value - low for value, low in zip(values, lows, strict=True)]]
        spread += [[high - value for value, high in zip(values, highs, strict=True)]]
        axes.barh(names, values, xerr=spread, color=[colours[name] for name in names], ecolor="0.3", capsize=3)
        axes.axvline(self.mark, color="0.3", linewidth=1)
        axes.set(xlabel=self.x)
        return {}


def draw(panels: Sequence[Panel | Bars], path: Path, title: str = "") -> None:
    """Write a PNG."""
    from matplotlib.figure import Figure

    across = min(len(panels), _PANELS_A_ROW)
    down = -(-len(panels) // across)
    size = (max(6.0, _INCHES[0] * across), _INCHES[1] * down + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    names = dict.fromkeys(name for panel in panels for name in panel.lines)
    colours = {name: f"C{number}" for number, name in enumerate(names)}
    handles: dict[str, Any] = {}
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(down, across, index + 1)
        handles |= panel.draw(axes, colours)
        axes.set_title(panel.title, fontsize="medium")
        axes.grid(alpha=0.3)
    if handles:
        columns = min(6, 2 * across)
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns, frameon=False)
    figure.suptitle(title, fontsize="medium", wrap=True)
    with writing(path):
        figure.savefig(path)


def read_methods(written: Iterable[str]) -> dict[str, Config]:
    """Configurations by their spelling, full attention left out: it is there anyway.

    Raises:
        ConfigError: a method that is none, or that has no budget.
    """
    found = {}
    for spelling in split_methods(written):
        method, own = read_method(spelling)
        config = Config.of(method, **own)
        if config.fitting(budget=1):
            found[spelling] = config
        elif method != FULL:
            raise ConfigError(f"{spelling} has no budget, so that nothing is left to compare", "leave it out")
    return found
