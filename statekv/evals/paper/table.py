"""The paper's results: accuracy in percent at ≤ 1 frame/s and ≤ 512 frames, without subtitles, B = 4096.

Source: arXiv 2605.31598. Its middle column, "ReKV (R = 16)", retrieves nothing: it is a recency window.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from statekv.config import Config

TASKS = ("videomme", "mlvu", "ovo_realtime")
METHODS = ("full", "recency_window", "statekv")
TABLE = (*METHODS, "statekv_weighted")  # what is run, and stands side by side
BUDGET = 4096
_FPS, _MOST_FRAMES = 1.0, 512
# Which of a task's figures stands beside the paper's.
MEANS = {
    "videomme": "the share of all questions stands beside the paper's",
    "mlvu": "the mean of the task types stands beside the paper's, as in lmms-eval; that of all questions is told",
    "ovo_realtime": (
        "the mean of the sub-tasks stands beside the paper's, as the benchmark and lmms-eval report it; that of all "
        "questions is told. Which one the paper's is, is not known here, and others publish the mean of real-time and "
        "backward. Plain Qwen3-VL-8B is published at 66.8 with 0.5 frames/s; the paper has 67.86, with StateKV 64.99"
    ),
}

# For each task of `TASKS` the methods of `METHODS`.
_ROWS: Mapping[str, tuple[tuple[float, float, float], ...]] = {
    "internvl3-1b": ((46.19, 37.11, 45.80), (47.05, 33.44, 46.35), (55.79, 37.75, 55.44)),
    "internvl3-2b": ((55.81, 31.78, 54.15), (56.61, 5.49, 57.31), (60.22, 33.33, 61.05)),
    "qwen3-vl-2b": ((58.67, 49.44, 58.00), (58.83, 45.60, 57.72), (60.45, 46.71, 60.93)),
    "qwen3-vl-4b": ((66.59, 52.63, 65.89), (68.98, 49.91, 67.80), (64.76, 49.22, 64.87)),
    "internvl3-8b": ((64.19, 54.56, 62.52), (61.14, 31.11, 62.85), (71.45, 56.03, 70.25)),
    "eagle2.5-8b": ((69.81, 58.70, 67.96), (73.85, 55.01, 70.52), (69.30, 55.44, 68.70)),
    "qwen3-vl-8b": ((70.52, 55.52, 68.11), (75.82, 50.91, 71.38), (67.86, 53.88, 64.99)),
}


def paper_name(model: str) -> str | None:
    """Which of the paper's models a checkpoint is by its name, a hub id or a folder; None: none of them."""
    name = re.split(r"[/\\]", model.rstrip("/\\"))[-1].lower()
    return next((known for known in _ROWS if re.fullmatch(rf"{re.escape(known)}(-hf|-instruct)?", name)), None)


def paper_share(task: str, model: str, config: Config) -> float | None:
    """What the paper reports, as a share of 1; None where it does not.

    Args:
        model: a hub id or a folder, whose last part names the checkpoint.
        config: how it was run; full attention, or one of the paper's methods at its budget, on as many frames.
    """
    known, method, frames = paper_name(model), config.method, (config.fps, config.max_frames)
    if known is None or task not in TASKS or method not in METHODS or frames != (_FPS, _MOST_FRAMES):
        return None
    if method != "full" and config.budget != BUDGET:
        return None
    return _ROWS[known][TASKS.index(task)][METHODS.index(method)] / 100
