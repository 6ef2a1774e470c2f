"""What a benchmark found, with everything needed to find it again: one row of a tracked CSV file."""

from __future__ import annotations

import csv
import datetime
import json
import math
import platform
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from statekv.errors import ConfigError

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
    setting: Mapping[str, str | int | float]
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
        today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        return cls(command, device_name(device), torch.get_num_threads(), _versions(), _commit(), today)


def append(path: Path, rows: Iterable[Row], circumstances: Circumstances) -> None:
    """Add rows to a CSV file, with a header where the file is new.

    Raises:
        ConfigError: the file has other columns.
    """
    check_columns(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if file.tell() == 0:
            writer.writerow(_HEADER)
        for row in rows:
            writer.writerow(_cells(row, circumstances))


def check_columns(path: Path) -> None:
    """Raise a ConfigError if a file is there and is not a benchmark's."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        first = file.readline().rstrip("\n")
    if first and first != ",".join(_HEADER):
        raise ConfigError(f"{path} does not begin with the columns of a benchmark", "give another file")


_HEADER = (
    *("bench", "subject", "setting", "unit", "p20", "p50", "p80", "runs", "floor", "distance", "ratio", "remark"),
    *("device", "threads", "versions", "commit", "date", "command"),
)


def _cells(row: Row, at: Circumstances) -> list[str | int]:
    figures = [_figure(row.quantile(share) if row.samples else None) for share in (0.2, 0.5, 0.8)]
    limits = [_figure(found) for found in (row.floor, row.distance, row.ratio)]
    setting = json.dumps(dict(row.setting))
    measured: list[str | int] = [
        row.bench,
        row.subject,
        setting,
        row.unit,
        *figures,
        len(row.samples),
        *limits,
        row.remark,
    ]
    return [*measured, at.device, at.threads, at.versions, at.commit, at.date, at.command]


def _figure(value: float | None) -> str:
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
    here = Path(__file__).parent
    try:
        tracked = subprocess.run(
            ["git", "ls-files", "--error-unmatch", "../__init__.py"], cwd=here, capture_output=True
        )
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True)
    except OSError:
        return ""
    if tracked.returncode or head.returncode:
        return ""
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
