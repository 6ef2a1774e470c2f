"""What an analysis found, as CSV files and as one summary."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from statekv.analysis.concentration import BUDGETS, Curves
from statekv.analysis.holdings import Analysis
from statekv.errors import writing


def write_tables(found: Curves, folder: Path) -> list[Path]:
    """Write concentration.csv and layers.csv, and of a video held.csv.

    concentration.csv has a row for each layer and budget, as the figures 6 to 8; layers.csv what the carried cache
    captured in each layer; held.csv, for each moment, how much of each frame the carried cache held.
    """
    curves = [
        (row.layer, budget, *values)
        for row in found.shares
        for budget, *values in zip(BUDGETS, row.captured, row.recall, row.retention, row.churn, strict=True)
    ]
    layers = [(row.layer, found.budget, row.best, row.carried) for row in found.shares]
    files = [
        _write(folder / "concentration.csv", "layer,budget,captured,weighted_recall,retention,churn", curves),
        _write(folder / "layers.csv", "layer,budget,captured_by_best,captured_by_carried", layers),
    ]
    if isinstance(found, Analysis):
        held = [
            (moment.step, moment.pts_seconds, picture.step, picture.pts_seconds, round(float(share), 4))
            for moment in found.moments
            for picture, share in zip(found.pictures, moment.frames, strict=False)
            if share
        ]
        files.append(_write(folder / "held.csv", "after_step,after_seconds,step,seconds,share", held))
    return files


def summary(found: Curves) -> dict[str, Any]:
    """The analysis as plain numbers: means over layers, and of a video what the carried cache held at the end."""
    mean = found.mean_shares()
    curves = {"captured": mean.captured, "weighted_recall": mean.recall, "churn": mean.churn}
    told: dict[str, Any] = {"frames": found.frames} if isinstance(found, Analysis) else {}
    told |= {
        "steps": found.steps,
        "tokens": found.tokens,
        "budget": found.budget,
        "layers": [row.layer for row in found.shares],
        "kv_heads": found.kv_heads,
        "by_budget": {name: dict(zip(map(str, BUDGETS), values, strict=True)) for name, values in curves.items()},
        "captured_by_best": mean.best,
        "captured_by_carried": mean.carried,
    }
    return {**told, "held_at_the_end": _end(found)} if isinstance(found, Analysis) else told


def _end(found: Analysis) -> dict[str, float]:
    last = found.moments[-1]
    return {
        "text": last.text,
        "text_of_the_stream": found.text,
        "newest_step": float(last.frames[-1]),
        "oldest_half_of_the_steps": float(last.frames[: found.steps // 2].sum() / last.frames.sum()),
    }


def _write(path: Path, heading: str, rows: Iterable[Sequence[Any]]) -> Path:
    with writing(path), path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(heading.split(","))
        writer.writerows([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in rows)
    return path
