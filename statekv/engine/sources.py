"""A session's source from its settings: opened, counted, or found again."""

from __future__ import annotations

import os
from collections.abc import Iterator

from statekv.cache.folder import Saved
from statekv.config import Config
from statekv.errors import ConfigError
from statekv.video.address import check_scheme, locate
from statekv.video.frame import Frame
from statekv.video.left import Left
from statekv.video.live import LiveSettings, LiveSource, Unopened
from statekv.video.reader import count_frames
from statekv.video.resume import Footage
from statekv.video.source import display_name, local_path


def live_source(
    source: str | os.PathLike[str],
    config: Config,
    stream: int | None,
    until_seconds: float | None,
    duration_seconds: float | None = None,
    left: Left | None = None,
) -> LiveSource:
    """A live source; `until_seconds` counts from its first frame."""
    settings = LiveSettings(
        fps=config.fps,
        max_frames=config.max_frames,
        duration_seconds=duration_seconds,
        depth=config.prefetch,
        max_lag_seconds=config.max_lag_seconds,
        reconnect_seconds=config.reconnect_seconds,
        until_seconds=until_seconds,
    )
    return LiveSource(source, settings, stream, left)


def source_again(saved: Saved, source: str | os.PathLike[str] | None, config: Config) -> Iterator[Frame] | None:
    """The source of a saved session, from where it was left."""
    known = saved.facts["source"]
    if source is not None:
        check_scheme(source, tuple(config.schemes.split(",")))
    if known is None:
        if source is not None:
            rule = f"the frames of {saved.folder} were pushed, they came from no source"
            raise ConfigError(rule, "leave the source out and push on, or set session.source")
        return None
    with saved.reading():
        left = Left(**known["left"]) if known["live"] else None
    if left is None:
        if source is not None and locate(source).live:
            rule = f"{known['address']} was watched before, {display_name(source)} is live"
            raise ConfigError(rule, "name the file, or open a session of its own")
        return Footage.resumed(known, source)
    if source is None:
        return Unopened(left)
    return live_source(source, config, left.stream, left.until_seconds, left.duration_seconds, left)


def frames_of(
    source: str | os.PathLike[str], config: Config, stream: int | None, until_seconds: float | None
) -> int | None:
    # Counting reads the file once without decoding it; a URL would be fetched twice.
    if local_path(source) is None:
        return None
    found = count_frames(source, config.fps, config.max_frames, stream, until_seconds)
    # Positions and pictures are sized by what enters together.
    return min(found, config.last_frames) if config.recall == "last_frames" else found
