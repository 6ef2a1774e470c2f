"""What is told before a run starts: what is there, which frames and figures are meant, what it will take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from statekv.config import told
from statekv.errors import MemoryLimitError
from statekv.evals.paper.check import Clip, DataCheck, WeightsCheck
from statekv.evals.paper.estimate import Trial, room, weight_bytes
from statekv.evals.paper.table import MEANS, paper_name
from statekv.models.loading import read_device, read_dtype
from statekv.runner.memory import check_fits

_WINDOW_STEPS = 16  # "ReKV (R = 16)"


@dataclass(frozen=True)
class Part:
    """One data set of a run.

    Attributes:
        found: what lies in its folder.
        waiting: videos that are not done yet.
        trial: on its longest video.
    """

    found: DataCheck
    waiting: Sequence[Clip]
    trial: Trial

    @property
    def detailed(self) -> Mapping[str, int]:
        """Bytes of each method's detailed cache at the end of the longest video."""
        return self.trial.detailed(self.found.longest)

    @property
    def cache_bytes(self) -> int:
        """Bytes of all caches then."""
        return sum(self.detailed.values()) + self.trial.carried


def weights_told(found: WeightsCheck) -> str:
    """What lies in the folder of weights."""
    kinds = " and ".join(found.weights.elements)
    sizes = f", the sizes of {found.known}" if found.known else ", none of the paper's models"
    if found.known and paper_name(found.name) is None:
        sizes += " (whose figures stand beside those of a folder of its name alone)"
    files = "1 file" if found.weights.files == 1 else f"{found.weights.files} files"
    return f"{found.family}{sizes}; {_count(found.weights.parameters)} parameters in {files}, {kinds}"


def data_told(found: DataCheck, folder: Path) -> str:
    """What lies in a folder of data."""
    lost = f"{len(found.missing)} videos missing, {len(found.faulty)} records or videos of no use"
    return f"{found.task.name} in {folder}: {len(found.questions)} questions on {len(found.clips)} videos; {lost}"


def faults_told(found: DataCheck) -> str:
    """The first of what is missing or of no use; "" where all is there."""
    reasons = [f"{path} is not there" for path in found.missing]
    reasons += [f"{name} {reason}" for name, reason in found.faulty.items()]
    rest = f", and {len(reasons) - 1} more" if len(reasons) > 1 else ""
    return f"{found.task.name}: {reasons[0]}{rest}" if reasons else ""


def frames_told(found: DataCheck, trial: Trial) -> str:
    """Frames per second, their number, and their pixels."""
    settings, counts = found.task.settings, [clip.frames for clip in found.clips]
    decoded = _range([(clip.width, clip.height) for clip in found.clips])
    seen = _range([trial.pixels(clip)[::-1] for clip in found.clips])
    return (
        f"at most {settings['fps']:g} a second and {settings['max_frames']} of a video: {min(counts)} … {max(counts)}, "
        f"{sum(counts):,} in all; of {decoded} pixels, seen as {seen}"
    )


def positions_told(trial: Trial, clip: Clip) -> str:
    """What becomes of a video beyond the trained length; "" where none is."""
    model, needed = trial.engine.model, trial.positions(clip)
    if needed <= model.trained_length:
        return ""
    way = "RoPE is scaled for it" if model.rope.kind == "dynamic" else "older steps move closer together"
    return f"{needed:,} positions for the longest video, {model.trained_length:,} were trained: {way}"


def plan_told(parts: Sequence[Part], shards: int) -> Iterator[tuple[str, str]]:
    """What is told of a run before it starts, each line with what it is about."""
    engine = parts[0].trial.engine
    for part in parts:
        name = part.found.task.name
        yield "frames", f"{name}: {frames_told(part.found, part.trial)}"
        yield "figure", f"{name}: {MEANS[name]}"
        if far := positions_told(part.trial, part.found.longest):
            yield "positions", f"{name}: {far}"
    yield "methods", methods_told(parts[0].trial)
    yield "memory", memory_told(parts)
    times = [part.trial.seconds(part.waiting) for part in parts]
    counts = ", ".join(f"{len(part.waiting)} of {len(part.found.clips)} of {part.found.task.name}" for part in parts)
    device = engine.model.kv_spec().devices[0].type
    shared = f", this process of {shards}" if shards > 1 else ""
    yield "time", f"about {clock(sum(times))} on {device} for videos that are not done yet, {counts}{shared}"


def methods_told(trial: Trial) -> str:
    """The methods, and how many steps the recency window is, which in the paper is sixteen."""
    step = trial.words + trial.patches
    told = []
    for name, cost in trial.costs.items():
        config = cost.stream.config
        if config.method == "recency_window":
            here = f"here {config.budget / step:.3g} steps of {step} tokens"
            name += f' (the release\'s "ReKV (R = {_WINDOW_STEPS})"; {here})'
        told.append(name)
    return ", ".join(told)


def memory_told(parts: Sequence[Part]) -> str:
    """Weights and caches at their largest, and what can be had."""
    engine = parts[0].trial.engine
    most = max(parts, key=lambda part: part.cache_bytes)
    weights, each = weight_bytes(engine), max(most.detailed.values())
    return (
        f"{told(weights + most.cache_bytes)}: weights {told(weights)}, detailed caches of the longest video "
        f"{len(most.detailed)} x {told(each)}, carried ones {told(most.trial.carried)} together; beside the weights "
        f"{told(room(engine))} can be had"
    )


def check_memory(parts: Sequence[Part]) -> None:
    """Raise a MemoryLimitError where the caches of the longest video do not fit beside the weights."""
    needed, free = max(part.cache_bytes for part in parts), room(parts[0].trial.engine)
    if needed > free:
        rule = f"the caches of the longest video take {told(needed)}, but {told(free)} can be had"
        raise MemoryLimitError(rule, "give one --method at a time, a half --dtype or a --device-map")


def check_weights_fit(found: WeightsCheck, loading: Mapping[str, Any]) -> None:
    """Raise a MemoryLimitError where the weights do not fit where they are to be loaded; before they are."""
    if loading.get("device_map") is not None:
        return
    device, dtype = read_device(loading.get("device", "auto")), read_dtype(loading.get("dtype", "auto"))
    if isinstance(dtype, str):
        own = max(found.weights.elements, key=lambda kind: found.weights.elements[kind])
        dtype = torch.float32 if device.type == "cpu" else read_dtype(own)
    assert isinstance(dtype, torch.dtype)
    check_fits(found.name, found.weights.parameters * dtype.itemsize, device, "give a half --dtype or a --device-map")


def clock(seconds: float) -> str:
    """`3 h 20 min`, `4 min`, `12 s`."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def _range(sizes: Sequence[tuple[int, int]]) -> str:
    ordered = sorted(set(sizes), key=lambda size: size[0] * size[1])
    ends = ordered if len(ordered) < 3 else [ordered[0], ordered[-1]]
    return " … ".join(f"{width} x {height}" for width, height in ends)


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e8 else f"{number / 1e6:.2f} M"
