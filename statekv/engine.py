"""The front door: load a model once, open any number of streams on it."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import torch

from statekv.config import Config
from statekv.errors import ConfigError, HorizonError
from statekv.models.base import VideoModel
from statekv.models.loading import load_model
from statekv.session import Session
from statekv.stepper import Stepper, room_for_answers
from statekv.video.reader import VideoInfo, count_frames, probe, read_frames


class Engine:
    """A loaded model that opens sessions.

    Args:
        model: the checkpoint's adapter, its texts included. Its attention is ours from the first step until `close`.
        config: settings of sessions that do not say otherwise.
    """

    def __init__(self, model: VideoModel, config: Config) -> None:
        self.model = model
        self.config = config
        self.stepper = Stepper(model)
        self._attention_before = model.text_config._attn_implementation

    def open(
        self,
        source: str | os.PathLike[str] | None = None,
        method: str | None = None,
        stream: int | None = None,
        until_seconds: float | None = None,
        **settings: Any,
    ) -> Session:
        """Open a stream.

        Args:
            source: path or URL of a video; None for a stream whose frames are pushed.
            method: one of statekv.config.METHODS; None: the engine's dials.
            stream: which of the file's video streams, from 0; None: the one FFmpeg thinks best.
            until_seconds: where the video ends, as if it had been cut there; None: whole.
            settings: fields of `Config` that differ from the engine's.

        Raises:
            ConfigError: an unknown method or setting, a value outside its range, or uniform sampling of a source whose
                length is unknown.
            VideoError: the source cannot be opened.
            HorizonError: the file is longer than the model's positions reach.
        """
        config = self.config.with_(method, **settings)
        if source is None:
            _check_length(config, None)
            return Session(self.stepper, self.stepper.open(config))
        info = probe(source, stream)
        if until_seconds is not None:
            seconds = until_seconds - info.start_seconds
            info = replace(info, duration_seconds=min(seconds, info.duration_seconds or seconds))
        _check_length(config, info.duration_seconds)
        frames = _count(source, config, stream, until_seconds)
        horizon = self._horizon(config, frames, info)
        reading = read_frames(source, config.fps, config.max_frames, stream, config.prefetch, until_seconds)
        return Session(self.stepper, self.stepper.open(config, horizon, frames), reading)

    def check_question(self, question: str) -> None:
        """Raise the ConfigError that asking would raise, without a stream: empty, or with the model's vision tokens."""
        self.model.prompts[self.config.layout].tail_ids(question)

    def close(self) -> None:
        """Hand the model's attention back to transformers; a session that goes on takes it again."""
        self.model.model.set_attn_implementation({"text_config": self._attention_before})

    def _horizon(self, config: Config, frames: int | None, info: VideoInfo) -> int:
        """Positions for a file of so many frames; never fewer than the model was trained for.

        Raises:
            HorizonError: the model's RoPE cannot be scaled that far; known before any work is done.
        """
        trained = self.model.trained_length
        if frames is None or config.horizon is not None:
            return trained
        layout = self.model.prompts[config.layout].layout
        # The newest frames alone are a clip that is no longer than its own few positions.
        seconds = None if config.recall == "last_frames" else info.duration_seconds
        longest = self.model.span(frames, info.height, info.width, layout, seconds)
        needed = longest + room_for_answers(config)
        if needed > trained and self.model.rope.kind != "dynamic":
            raise HorizonError(
                f"{frames} frames need up to {needed} positions, but the model was trained for {trained}",
                f"lower fps or max_frames, or accept the risk with horizon={needed}",
            )
        return max(needed, trained)


def load(
    model: str = "demo",
    method: str | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    device_map: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **settings: Any,
) -> Engine:
    """Load a checkpoint.

    Args:
        model: a hub id, a folder in the Hugging Face layout, or "demo".
        method: one of statekv.config.METHODS; None is StateKV.
        dtype: "auto": the checkpoint's own on CUDA, float32 on a CPU.
        device: "auto": CUDA where there is one, else the CPU.
        device_map: passed on to transformers.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run code that comes with the checkpoint.
        settings: fields of `Config`.

    Raises:
        ConfigError: an unknown method or setting, or a value outside its range.
        ModelError: a checkpoint that is not found, not supported or does not load.
    """
    config = Config.of(method, **settings)
    loaded = load_model(
        model,
        dtype=dtype,
        device=device,
        device_map=device_map,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    return Engine(loaded, config)


def _check_length(config: Config, duration_seconds: float | None) -> None:
    if config.uniform and duration_seconds is None:
        raise ConfigError(
            "uniform spreads its frames over the whole video, but the length of this source is unknown",
            "use a file, or another method, such as last_frames",
        )


def _count(
    source: str | os.PathLike[str], config: Config, stream: int | None, until_seconds: float | None
) -> int | None:
    # Counting reads the file once without decoding it; a URL would be fetched twice.
    if urlsplit(str(source)).netloc:
        return None
    found = count_frames(source, config.fps, config.max_frames, stream, until_seconds)
    # Positions and pictures are sized by what enters together.
    return min(found, config.last_frames) if config.recall == "last_frames" else found
