"""Benchmarks: tasks, one prefill for all questions of a video, results that can be resumed and merged, the report."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from statekv.errors import ConfigError
from statekv.evals.task import Task

# Resolved at first use; a class takes the folder of its data, or None.
TASKS: Mapping[str, str] = {
    "cards": "statekv.evals.tasks.cards:Cards",
    "videomme": "statekv.evals.tasks.videomme:VideoMME",
    "mlvu": "statekv.evals.tasks.mlvu:MLVU",
    "ovo_realtime": "statekv.evals.tasks.ovo:OVORealtime",
    "ovo_backward": "statekv.evals.tasks.ovo:OVOBackward",
}


def open_task(name: str, folder: Path | None = None, **options: Any) -> Task:
    """A benchmark by its name (a ConfigError lists those that are known), with the folder of its data (None: its
    default place) and further arguments of its class.
    """
    if name not in TASKS:
        raise ConfigError(f"unknown task {name!r}", f"known: {', '.join(TASKS)}")
    module, _, kind = TASKS[name].partition(":")
    task: Task = getattr(importlib.import_module(module), kind)(folder, **options)
    return task
