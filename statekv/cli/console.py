"""Where commands write: tables and answers to one stream, progress, notes and warnings to the other."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

notes = Console(stderr=True, highlight=False)


def out() -> Console:
    """Standard output for tables."""
    # A pipe has no width: 80 columns would cut the tables.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def progress() -> Progress:
    """A bar on a terminal, nothing in a pipe."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal)


def show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """One line instead of Python's three."""
    notes.print(f"statekv: warning: {message}", markup=False, soft_wrap=True)
