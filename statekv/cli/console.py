"""Where commands write: tables and answers to one stream, progress, notes and warnings to the other."""

from __future__ import annotations

import gc
import io
import json
import logging
import math
import os
import sys
import threading
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import statekv
from statekv.errors import ConfigError, OutputError

if TYPE_CHECKING:
    import torch

    from statekv.bench.harness import Bars, Panel, Row
    from statekv.engine.engine import Engine

notes = Console(stderr=True, highlight=False)  # progress and remarks: --quiet keeps them
complaints = Console(stderr=True, highlight=False)  # what must not be missed

SECONDS_OF_SILENCE = 10.0  # between two lines about work that goes on, where there is no terminal


class _Standard(io.FileIO):
    """Standard output or standard error. What cannot be written is told once, as ours; the rest goes nowhere.

    Args:
        descriptor: which one.
        told: whether a failure is: that of standard error is nowhere to be told.
    """

    def __init__(self, descriptor: int, told: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._told, self._failed = told, False

    def write(self, data: Any) -> int:
        """As of any file, but that nothing is kept to be tried again."""
        if not self._failed:
            try:
                return super().write(data) or 0
            except BrokenPipeError:
                self._failed = True
                if self._told:
                    raise  # a reader who has enough: no words
            except OSError as error:
                self._failed = True
                if self._told:
                    rule = f"standard output cannot be written: {(error.strerror or '').lower()}"
                    raise OutputError(rule, "make room, or send it elsewhere") from None
        return memoryview(data).nbytes


def guard_standard_streams() -> None:
    """For the rest of the process: see to standard output and standard error, which may be full or gone; an OutputError
    where standard output is closed.
    """
    with suppress(OSError):
        while (free := os.open(os.devnull, os.O_RDWR)) <= 2:  # else the next file that is opened would be one of them
            pass
        os.close(free)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stdout is None:
        raise OutputError("standard output is closed", "send it somewhere, if need be to /dev/null")
    if sys.platform == "win32":  # whose console is no file
        return
    if sys.stdout is sys.__stdout__:
        sys.stdout = _guarded(sys.stdout, told=True)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _guarded(sys.stderr, told=False)


def _guarded(stream: Any, told: bool) -> io.TextIOWrapper:
    buffer = io.BufferedWriter(_Standard(stream.fileno(), told))
    lines = stream.line_buffering
    return io.TextIOWrapper(buffer, encoding=stream.encoding, errors="backslashreplace", line_buffering=lines)


def out() -> Console:
    """Standard output for tables."""
    # A pipe has no width: 80 columns would cut the tables.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def speak(quiet: bool, verbose: bool, no_color: bool) -> None:
    """Decide what is said on standard error for as long as the process, or until it is decided anew."""
    if no_color:
        os.environ["NO_COLOR"] = "1"  # also for consoles that are made later
    notes.quiet = quiet
    notes.no_color = complaints.no_color = bool(os.environ.get("NO_COLOR"))
    log = logging.getLogger("statekv")
    log.handlers = [handler for handler in log.handlers if not isinstance(handler, _Log)]
    log.setLevel(logging.DEBUG if verbose else logging.NOTSET)
    if verbose:
        log.addHandler(_Log())


class _Log(logging.Handler):
    """What the library logs, as lines on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        complain(f"{record.name}: {record.getMessage()}")


def remark(text: str) -> None:
    """A line that --quiet keeps back."""
    notes.print(f"statekv: {text}", markup=False, soft_wrap=True)


def complain(text: str) -> None:
    """A line that is always shown."""
    complaints.print(f"statekv: {text}", markup=False, soft_wrap=True)


def progress() -> Progress:
    """A bar on a terminal; in a pipe a line every ten seconds."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    kind = Progress if notes.is_terminal else _Lines
    return kind(*columns, console=notes, transient=True, disable=notes.quiet or not notes.is_terminal)


class _Lines(Progress):
    """How far things are, told now and then whether or not they move: a log shows that somebody is alive."""

    def start(self) -> None:
        """Begin to tell."""
        self._stopped = threading.Event()
        threading.Thread(target=self._tell, daemon=True).start()

    def stop(self) -> None:
        """Be silent from here on."""
        self._stopped.set()

    def _tell(self) -> None:
        while not self._stopped.wait(SECONDS_OF_SILENCE):
            for task in self.tasks:
                known = "" if task.total is None else f" of {task.total:.0f}"
                done = f" {task.completed:.0f}{known}" if task.completed or known else ""
                remark(f"{task.description}{done} after {task.elapsed or 0:.0f} s")


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Say so for as long as the block lasts, which imports packages or loads weights."""
    columns = (TextColumn("{task.description} …"), TimeElapsedColumn())
    with _uncollected(), progress() as bar:
        bar.columns = columns
        bar.add_task(what, total=None)
        yield


@contextmanager
def _uncollected() -> Iterator[None]:
    """Leave garbage for later: what imports make stays, and looking through it takes a fifth of the start."""
    first, collecting = "torch" not in sys.modules, gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if first:
            gc.freeze()  # nor is it looked through once afterwards
        if collecting:
            gc.enable()


def load(**arguments: Any) -> Engine:
    """`statekv.load`, told before torch is imported for it, which takes its time."""
    with doing(f"loading {arguments.get('model', 'demo')}"):
        engine = statekv.load(**arguments)
    _spare_threads(engine)
    return engine


_SMALL = 30_000_000  # parameters: the demo model's layers are done before a second thread has woken up


def _spare_threads(engine: Engine) -> None:
    """A small model steps faster with one thread on a CPU; the environment may say otherwise."""
    import torch

    small = sum(parameter.numel() for parameter in engine.model.model.parameters()) < _SMALL
    if small and engine.model.model.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


_DIGITS, _DECIMALS = 6, 3


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON in which no number has more than six digits, or three decimals; NaN is none."""
    return json.dumps(rounded(value), indent=indent, ensure_ascii=False, allow_nan=False)


def rounded(value: Any) -> Any:
    """Numbers, also those within lists and dicts, with the digits that `to_json` gives them."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return round(value, _DECIMALS) if abs(value) >= 10 ** (_DIGITS - _DECIMALS) else float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, (list, tuple)) else value


def show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """One line instead of Python's three."""
    complain(f"warning: {message}")


class Report:
    """Where one run's rows and picture go; checked before the minutes of work.

    Args:
        csv: file to append to; None: benchmarks/results/ where there is such a folder, else statekv-bench/.
        picture: PNG to write; None: beside the CSV.
        as_json: rows are shown as JSON, not as a table.

    Raises:
        ConfigError: a place that cannot be written to.
    """

    def __init__(self, bench: str, csv: Path | None, picture: Path | None, as_json: bool) -> None:
        from statekv.bench.harness import check_columns

        results = Path("benchmarks", "results")
        self.csv = csv or (results if results.is_dir() else Path("statekv-bench")) / f"{bench}.csv"
        self._as_json = as_json
        _check_place(self.csv)
        self.picture = picture or self.csv.with_suffix(".png")
        _check_place(self.picture)
        check_columns(self.csv)

    def publish(self, title: str, rows: Sequence[Row], panels: Sequence[Panel | Bars], device: torch.device) -> None:
        """Show the rows, append them, draw the panels, and say where they are."""
        from statekv.bench.harness import Circumstances, append, draw, told

        here = Circumstances.here(" ".join(["statekv", *sys.argv[1:]]), device)
        if self._as_json:
            typer.echo("\n".join(to_json(told(row, here)) for row in rows))
        else:
            out().print(table(f"{title} · {here.device}, {here.threads} threads, {here.date}", rows))
        append(self.csv, rows, here)
        written = f"rows: {self.csv}"
        if any(panel.lines for panel in panels):
            draw(panels, self.picture, f"{title} · {here.device}")
            written += f"    picture: {self.picture}"
        notes.print(written, markup=False, soft_wrap=True)


def table(title: str, rows: Sequence[Row]) -> Table:
    """One line per row; what all rows share stands in the title, what none has is left out."""
    keys = list(dict.fromkeys(key for row in rows for key in row.setting))
    varying = [key for key in keys if len({row.setting.get(key) for row in rows}) > 1]
    shared = [f"{key} {rows[0].setting[key]}" for key in keys if key not in varying]
    if len({row.unit for row in rows}) == 1:
        shared.append(f"in {rows[0].unit}")
    columns = {"": [row.subject for row in rows]}
    columns |= {key: [str(row.setting.get(key, "")) for row in rows] for key in varying}
    columns |= {"unit": [row.unit for row in rows] if len({row.unit for row in rows}) > 1 else []}
    timed = any(len(row.samples) > 1 for row in rows)  # what is counted has no spread
    for share in (20, 50, 80) if timed else (50,):
        heading = f"p{share}" if timed else "found"
        columns[heading] = [_figure(row.quantile(share / 100) if row.samples else None) for row in rows]
    columns |= {
        "floor": [_figure(row.floor) for row in rows],
        "× floor": [_figure(row.distance) for row in rows],
        "× stock": [_figure(row.ratio) for row in rows],
        "remark": [row.remark for row in rows],
    }
    return columned(", ".join([title, *shared]), columns, ("", "unit", "remark", *varying))


def columned(title: str, columns: Mapping[str, Sequence[str]], words: Container[str]) -> Table:
    """Columns by their headings, those of `words` on the left; what no row has is left out."""
    found = Table(title=title, title_justify="left", box=None, pad_edge=False)
    shown = {heading: cells for heading, cells in columns.items() if any(cells)}
    for heading in shown:
        found.add_column(heading, justify="left" if heading in words else "right", overflow="fold")
    for cells in zip(*shown.values(), strict=True):
        found.add_row(*cells)
    return found


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _check_place(path: Path) -> None:
    if path.is_dir():
        raise ConfigError(f"{path} is a folder, but must be a file", "add a file's name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path.parent} cannot be made: {error.strerror}", "give another place") from None
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{path} cannot be written", "give another place")
