"""Pixels with times: reads, samples, prefetches and writes video, and knows nothing of models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from statekv.video.file import VideoInfo, count_frames, probe, read_frames
    from statekv.video.frame import Frame
    from statekv.video.live import LiveSettings, LiveSource
    from statekv.video.resume import open_video
    from statekv.video.sampling import FrameGate, FrameSampler
    from statekv.video.source import LiveStatus, PushedSource, Source
    from statekv.video.writer import write_video

# Looked up at first use: an address can be checked without importing torch or PyAV.
_HOMES = {
    **dict.fromkeys(("VideoInfo", "count_frames", "probe", "read_frames"), "file"),
    "Frame": "frame",
    **dict.fromkeys(("LiveSettings", "LiveSource"), "live"),
    "open_video": "resume",
    **dict.fromkeys(("FrameGate", "FrameSampler"), "sampling"),
    **dict.fromkeys(("LiveStatus", "PushedSource", "Source"), "source"),
    "write_video": "writer",
}

__all__ = [
    "Frame",
    "FrameGate",
    "FrameSampler",
    "LiveSettings",
    "LiveSource",
    "LiveStatus",
    "PushedSource",
    "Source",
    "VideoInfo",
    "count_frames",
    "open_video",
    "probe",
    "read_frames",
    "write_video",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'statekv.video' has no attribute {name!r}")
    return getattr(import_module(f"statekv.video.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
