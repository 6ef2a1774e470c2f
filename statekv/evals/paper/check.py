"""What lies in a folder of weights and in folders of data, told before anything long starts."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from statekv.config import SETTINGS, told
from statekv.errors import ConfigError, ModelError, VideoError
from statekv.evals.results import Shard, file_name, read
from statekv.evals.runner import distinct_videos
from statekv.evals.task import EvalQuestion, EvalVideo
from statekv.evals.tasks.mlvu import MLVU
from statekv.evals.tasks.ovo import OVORealtime
from statekv.evals.tasks.videomme import VideoMME
from statekv.models import adapter_of
from statekv.models.checkpoint import Weights, check_config, look_at_weights, read_checkpoint_json
from statekv.models.loading import DEMO
from statekv.models.size import Size
from statekv.video.file import VideoInfo, count_frames, probe

_KINDS = (VideoMME, MLVU, OVORealtime)  # the columns of the paper's table
_OWN_LAYOUT = "internvl_chat"  # InternVL3 as its authors publish it beside the one for transformers
_LINE_BYTES = 2048  # of a question in a result file, at most


@dataclass(frozen=True)
class WeightsCheck:
    """A folder of weights that can be loaded, as far as that is known before.

    Attributes:
        name: as results call it: the folder, from the root on, or "demo".
        family: the `model_type`.
        known: which of the public models its configuration has the sizes of; None: none of them.
        weights: by the headers of its files.
    """

    name: str
    family: str
    known: str | None
    weights: Weights


def check_weights(model: str) -> WeightsCheck:
    """Look at a checkpoint, a folder or "demo", without loading it.

    Raises:
        ModelError: not a folder, one that is not whole, or of no supported family.
    """
    folder = DEMO if model == "demo" else Path(model)
    if not folder.is_dir():
        rule = f"{folder} is not a folder of weights"
        raise ModelError(rule, "hf download OpenGVLab/InternVL3-1B-hf --local-dir FOLDER is one way to get one")
    values = read_checkpoint_json(str(folder), "config.json")
    if values is None:
        raise ModelError(f"{folder} has no config.json", "give the folder that a checkpoint was downloaded to")
    family = str(values.get("model_type"))
    if family == _OWN_LAYOUT:
        raise ModelError(f"{folder} is in InternVL's own layout", "get the checkpoint whose name ends in -hf")
    sizes = adapter_of(family).sizes
    check_config(str(folder), values)
    known = next((size.name for size in sizes if _is(size, values["text_config"])), None)
    name = model if model == "demo" else str(folder.absolute())
    return WeightsCheck(name, family, known, look_at_weights(folder))


def _is(size: Size, text: Mapping[str, Any]) -> bool:
    fields = {
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
    }
    return all(text.get(name) == value for name, value in fields.items())


@dataclass(frozen=True)
class Clip:
    """A video whose file is there and opens.

    Attributes:
        frames: that will be sampled of it, by its length.
        seconds: of it that will be read.
        width, height: in pixels, as decoded.
    """

    video: EvalVideo
    frames: int
    seconds: float
    width: int
    height: int


@dataclass
class DataCheck:
    """A data set whose records can be read.

    Attributes:
        missing: paths of videos that are not there.
        faulty: records and videos that cannot be used, with the reason.
    """

    task: VideoMME | MLVU | OVORealtime
    clips: list[Clip] = field(default_factory=list)
    missing: list[Path] = field(default_factory=list)
    faulty: dict[str, str] = field(default_factory=dict)

    @property
    def questions(self) -> list[EvalQuestion]:
        """Those about videos that are there."""
        return [question for clip in self.clips for question in clip.video.questions]

    @property
    def longest(self) -> Clip:
        """The clip of the most frames, and of those the one of the largest pictures."""
        return max(self.clips, key=lambda clip: (clip.frames, clip.width * clip.height))


def check_data(folder: Path, most: int | None = None, on_video: Callable[[], None] | None = None) -> DataCheck:
    """Find out which data set a folder holds, read its records and open each video.

    Args:
        most: so many of its first videos; None: all.
        on_video: called after each.

    Raises:
        ConfigError: none of the paper's data sets, records that cannot be read, or not one video.
    """
    found = DataCheck(_recognised(folder))
    for video in distinct_videos(islice(found.task.videos(), most)):
        if not isinstance(video, EvalVideo):
            found.faulty[video.id] = video.reason
        elif not video.path.exists():
            found.missing.append(video.path)
        else:
            try:
                found.clips.append(_clip(video, found.task.settings))
            except VideoError as error:
                found.faulty[video.id] = str(error)
        if on_video is not None:
            on_video()
    if not found.clips:
        lost = f"{len(found.missing)} are missing, {len(found.faulty)} cannot be used"
        raise ConfigError(f"none of the videos of {folder} is there: {lost}", "unpack those of the data set there")
    return found


def _recognised(folder: Path) -> VideoMME | MLVU | OVORealtime:
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder of data", "docs/evals.md says what it holds")
    tasks = [kind(folder) for kind in _KINDS]
    for task in tasks:
        if task.data.holds(folder):
            return task
    known = ", ".join(task.name for task in tasks)
    raise ConfigError(f"{folder} holds records of none of {known}", "docs/evals.md lists their files and fields")


def _clip(video: EvalVideo, settings: Mapping[str, Any]) -> Clip:
    fps, most = settings["fps"], settings["max_frames"]
    info = probe(video.path, max_pixels=SETTINGS["max_pixels"].default)
    seconds = _seconds(info, video.until_seconds)
    if seconds is None:
        frames = count_frames(video.path, fps, most, until_seconds=video.until_seconds)
        return Clip(video, frames, frames / fps, info.width, info.height)
    frames = math.ceil(seconds * min(fps, info.frame_rate or fps))
    return Clip(video, min(most, max(1, frames)), seconds, info.width, info.height)


def _seconds(info: VideoInfo, until_seconds: float | None) -> float | None:
    if info.duration_seconds is None or until_seconds is None:
        return info.duration_seconds
    return min(info.duration_seconds, until_seconds - info.start_seconds)


def check_room(out: Path, questions: int, methods: int) -> None:
    """Raise a ConfigError unless there is room on disk for the results of so many questions with so many methods."""
    place = next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.is_dir())
    free, needed = shutil.disk_usage(place).free, _LINE_BYTES * questions * methods
    if free < needed:
        rule = f"results may take {told(needed)} in {out}, but {told(free)} are free"
        raise ConfigError(rule, "make room, or give another --out")


def left(found: DataCheck, place: Path, names: Iterable[str], part: Shard, model: str) -> list[Clip]:
    """Clips of a share of the work whose results are not complete with each configuration of these names.

    Raises:
        ConfigError: results of another model, or such as cannot be read.
    """
    files = [place / found.task.name / file_name(name, part) for name in names]
    done = [_done(file, model) if file.is_file() and file.stat().st_size else set() for file in files]
    return [clip for clip in part.of(found.clips) if not all(clip.video.id in videos for videos in done)]


def _done(file: Path, model: str) -> set[str]:
    found = read(file)
    if found.header.model != model:
        raise ConfigError(f"{file} is of {found.header.model}, not of {model}", "give another --out, or move it away")
    return set(found.videos)
