"""The paper's own table: accuracy in percent at ≤ 1 frame/s and ≤ 512 frames, without subtitles, B = 4096.

Source: arXiv 2605.31598. Its middle column, "ReKV (R = 16)", retrieves nothing: it is a recency window.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from statekv.config import Config

_TASKS = ("videomme", "mlvu", "ovo_realtime")
_METHODS = ("full", "recency_window", "statekv")
_BUDGET = 4096

# For each task of `_TASKS` the methods of `_METHODS`.
_ROWS: Mapping[str, tuple[tuple[float, float, float], ...]] = {
    "internvl3-1b": ((46.19, 37.11, 45.80), (47.05, 33.44, 46.35), (55.79, 37.75, 55.44)),
    "internvl3-2b": ((55.81, 31.78, 54.15), (56.61, 5.49, 57.31), (60.22, 33.33, 61.05)),
    "qwen3-vl-2b": ((58.67, 49.44, 58.00), (58.83, 45.60, 57.72), (60.45, 46.71, 60.93)),
    "qwen3-vl-4b": ((66.59, 52.63, 65.89), (68.98, 49.91, 67.80), (64.76, 49.22, 64.87)),
    "internvl3-8b": ((64.19, 54.56, 62.52), (61.14, 31.11, 62.85), (71.45, 56.03, 70.25)),
    "eagle2.5-8b": ((69.81, 58.70, 67.96), (73.85, 55.01, 70.52), (69.30, 55.44, 68.70)),
    "qwen3-vl-8b": ((70.52, 55.52, 68.11), (75.82, 50.91, 71.38), (67.86, 53.88, 64.99)),
}


def paper_share(task: str, model: str, config: Config) -> float | None:
    """What the paper reports, as a share of 1; None where it does not.

    Args:
        task: as the command line has it.
        model: a hub id or a folder, whose last part names the checkpoint.
        config: how it was run; full attention, or one of the paper's methods at its budget.
    """
    name = re.split(r"[/\\]", model.rstrip("/\\"))[-1].lower()
    known = next((known for known in _ROWS if re.fullmatch(rf"{re.escape(known)}(-hf|-instruct)?", name)), None)
    method = config.method
    if known is None or task not in _TASKS or method not in _METHODS:
        return None
    if method != "full" and config.budget != _BUDGET:
        return None
    return _ROWS[known][_TASKS.index(task)][_METHODS.index(method)] / 100
