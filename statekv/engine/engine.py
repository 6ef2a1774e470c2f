"""The front door: load a model once, open any number of streams on it."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NoReturn

import torch

from statekv.cache.carry import policy_of
from statekv.cache.folder import Saved, read_folder
from statekv.cache.stream import StreamState, room_for_answers
from statekv.config import Config, check_source
from statekv.engine.choice import gate_of, sampler_of, with_gate
from statekv.engine.scheduler import OnEnd, OnStep, Scheduler
from statekv.engine.session import Session
from statekv.engine.snapshot import load_session
from statekv.errors import ConfigError, HorizonError, VideoWarning, kind_of
from statekv.models.adapter import VideoModel
from statekv.models.loading import load_model
from statekv.runner.runner import ModelRunner, with_methods
from statekv.video.address import PathOrUrl, check_scheme, display_name, local_path, locate
from statekv.video.file import VideoInfo, count_frames, probe
from statekv.video.frame import Frame
from statekv.video.live import LiveSettings, LiveSource, ResumePoint, Unopened
from statekv.video.resume import ResumableVideo, open_video
from statekv.video.sampling import FrameSampler
from statekv.video.source import Source, as_source

_log = logging.getLogger(__name__)


class Engine:
    """A loaded model that opens sessions.

    Args:
        model: the checkpoint's adapter, its texts included. Its attention is ours from the first step until `close`.
        config: settings of sessions that do not say otherwise.
    """

    def __init__(self, model: VideoModel, config: Config) -> None:
        self.model = model
        self.config = config
        self.runner = ModelRunner(model)
        self._attention_before = model.text_config._attn_implementation

    def __reduce_ex__(self, _: object) -> NoReturn:
        raise ConfigError("an Engine cannot be copied or pickled", "open more sessions; another process loads its own")

    def open(
        self,
        source: PathOrUrl | Iterable[Frame] | None = None,
        method: str | None = None,
        stream: int | None = None,
        until_seconds: float | None = None,
        realtime: bool = False,
        **settings: Any,
    ) -> Session:
        """Open a stream.

        Cameras, standard input, UDP, TCP, RTP, RTSP and RTMP are live, and so is HTTP without a known length.

        Args:
            source: path or URL of a video, a camera (/dev/video0), "-" for standard input; frames, such as those of a
                `PushedSource` or of any iterator, which are taken as they come; None for a stream whose frames are
                pushed.
            method: one of statekv.config.METHODS; None: the engine's dials.
            stream: which of the file's video streams, from 0; None: the one FFmpeg thinks best.
            until_seconds: where the video ends, as if it had been cut there; None: whole.
            realtime: a file is shown no faster than it would be played, and frames are dropped as if it were live.
            settings: fields of `Config` that differ from the engine's.

        Raises:
            ConfigError: an unknown method or setting, a value outside its range, a setting that means nothing beside
                the others or with this source, uniform sampling of a source whose length is unknown, or a way to open
                frames that are there already.
            VideoError: the source cannot be opened, or its protocol is not allowed.
            HorizonError: the file is longer than the model's positions reach, and `on_horizon` is "error".
            MemoryLimitError: what it may take does not fit beside what open sessions may still grow by.
        """
        config = self.config.with_(method, **settings)
        sampler = sampler_of(config)
        if not isinstance(source, (str, os.PathLike)):
            frames = None if source is None else as_source(source)
            _check_opened(stream=stream, until_seconds=until_seconds, realtime=realtime or None)
            sampler.check_length(None)
            check_source(settings, "pushed")
            return Session(self.runner, self._state(config), frames)
        check_scheme(source, tuple(config.schemes.split(",")))
        info = None if locate(source).live else _cut(probe(source, stream, config.max_pixels), until_seconds)
        sampler.check_length(None if info is None else info.duration_seconds)
        check_source(settings, _kind(source, info, realtime))
        expected = None if info is None else _count(source, sampler, stream, until_seconds)
        needed = self._positions(config, sampler, expected, info)
        state = self._state(config, expected, *self._reach(config, expected, needed))
        _log.info("%s: %s frames, horizon %d", display_name(source), expected or "unknown", state.horizon)
        how = _reading(config, until_seconds)
        return Session(self.runner, state, open_video(source, how, stream, realtime, info))

    def restore(
        self, folder: str | os.PathLike[str], source: PathOrUrl | Iterable[Frame] | None = None, **settings: Any
    ) -> Session:
        """Go on with a session that `Session.save` wrote; its settings are those that it had, not the engine's.

        What follows equals, to the bit, what would have followed on the same machine. A file is read on from where it
        was left, once the session is watched; without it, what was seen can still be asked. A live source is opened
        only if it is named: its times go on by the clock on the wall, and the time in between is a gap.

        Args:
            folder: where it was saved.
            source: where the video is now, None: where it was; more frames, such as those of a `PushedSource`, for a
                session whose frames were pushed.
            settings: of answers and speed, such as max_new_tokens, to have anew.

        Raises:
            SaveError: the folder holds no saved session, or a damaged one, or one of another version.
            ModelError: the session belongs to another model, or to this one in another dtype.
            ConfigError: a setting that the stream was made with and that cannot change any more, or a source of another
                kind than the one before.
            VideoError: `source` is not the file that was watched, or cannot be opened.
            MemoryLimitError: what it may still grow by does not fit beside what open sessions may.
        """
        saved = read_folder(folder)
        with saved.reading():
            known = saved.facts["source"]
            kind = "pushed" if known is None else "live" if known["live"] else "file"
        check_source(settings, kind)
        state, snapshot = load_session(saved, self.model, settings)
        self.runner.check(state.config)
        self.runner.admission.admit(state)
        if state.spans:
            self.runner.reserve(state)
        return Session(self.runner, state, _source_again(saved, source, state.config), snapshot)

    def watch_all(
        self, sessions: Iterable[Session], on_step: OnStep | None = None, pause: Callable[[], bool] | None = None
    ) -> dict[Session, Exception]:
        """Watch several sessions to the ends of their sources, steps of equal shape and settings as one batch.

        In each round every session whose frames are there takes one step (`Scheduler`). One that fails
        leaves, the others go on. A live source that has no frame keeps nobody waiting; an iterator of your own does.

        Args:
            sessions: of this engine, with sources.
            on_step: called after each step, with its session.
            pause: asked between rounds; True: stop here.

        Returns:
            Why sessions stopped before the end of their sources.

        Raises:
            ConfigError: a session of another engine, one without a source, or one that is named twice.
        """
        failed: dict[Session, Exception] = {}

        def note(session: Session, error: Exception | None) -> None:
            if error is not None:
                failed[session] = error

        if not isinstance(sessions, Iterable):
            raise ConfigError(f"{kind_of(sessions)} cannot be watched", "give a list of sessions")
        rounds = self.scheduler(on_step, note)
        for number, session in enumerate(sessions, 1):
            if not isinstance(session, Session):
                raise ConfigError(f"{kind_of(session)} cannot be watched", "give sessions of this engine")
            rounds.add(session)
            if len(rounds) < number:
                raise ConfigError("one session is named twice", "name it once, or watch a fork of it")
        rounds.watch(pause)
        return failed

    def scheduler(self, on_step: OnStep | None = None, on_end: OnEnd | None = None) -> Scheduler:
        """What `watch_all` runs, for sessions that come and go meanwhile."""
        return Scheduler(self.runner, on_step, on_end)

    def check_question(self, question: str) -> None:
        """Raise the ConfigError that asking would raise, without a stream: empty, or with the model's vision tokens."""
        self.model.prompts[self.config.layout].tail_ids(question)

    def close(self) -> None:
        """Hand the model's attention back to transformers; a session that goes on takes it again."""
        with self.runner.lock:
            self.model.model.set_attn_implementation({"text_config": self._attention_before})

    def _state(
        self, config: Config, frames: int | None = None, horizon: int | None = None, compacts: bool | None = None
    ) -> StreamState:
        """An empty stream, where there is room for one."""
        compacts = config.on_horizon != "error" if compacts is None else compacts
        state = self.runner.open(with_gate(config), horizon, frames, compacts=compacts)
        self.runner.admission.admit(state)
        return state

    def _positions(
        self, config: Config, sampler: FrameSampler, frames: int | None, info: VideoInfo | None
    ) -> int | None:
        """How many a file of so many frames and the answers to it may take; None where its length is not known."""
        if frames is None or info is None:
            return None
        layout = self.model.prompts[config.layout].layout
        # The newest frames alone are a clip that is no longer than its own few positions.
        seconds = info.duration_seconds if sampler.newest is None else None
        longest = self.model.max_positions(frames, info.height, info.width, layout, seconds)
        return longest + room_for_answers(config)

    def _reach(self, config: Config, frames: int | None, needed: int | None) -> tuple[int | None, bool]:
        """The horizon, None where it is the configuration's or the trained length, and whether the stream compacts.

        Raises:
            HorizonError: steps may not be compacted, and the model's RoPE cannot be scaled so far; known before any
                work is done.
        """
        if needed is None or config.on_horizon == "compact":
            return None, config.on_horizon != "error"
        if config.horizon is not None:
            return None, False
        trained = self.model.trained_length
        if needed <= trained or self.model.rope.kind == "dynamic":
            return max(needed, trained), False
        rule = f"{frames} frames need up to {needed} positions, but the model was trained for {trained}"
        if config.on_horizon == "error":
            way_out = (
                f"lower `fps` or `max_frames`, set `on_horizon` to 'compact', or accept the risk of `horizon` {needed}"
            )
            raise HorizonError(rule, way_out)
        warnings.warn(VideoWarning(f"{rule}: older steps move closer together"), stacklevel=3)
        return None, True


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
    # A policy, a reducer or a gate that is not there is told before the checkpoint is read.
    if config.carry != "all":
        policy_of(config)
    with_methods(config)
    gate_of(config)
    where: dict[str, Any] = {"device": device, "device_map": device_map}
    loaded = load_model(model, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code, **where)
    spec = loaded.kv_spec()
    _log.info("%s: %s, keys in %s on %s", model, type(loaded).__name__, spec.dtype, loaded.model.device)
    return Engine(loaded, config)


def _check_opened(**given: object) -> None:
    """Raise ConfigError if something was said of how to open what is open already, or not there."""
    for name, value in given.items():
        if value is not None:
            rule = f"{name} is {value!r}, but says how to open a path or a URL, and none was given"
            raise ConfigError(rule, f"leave {name} out")


def _cut(info: VideoInfo, until_seconds: float | None) -> VideoInfo:
    """A video as if it had been cut there."""
    if until_seconds is None:
        return info
    seconds = until_seconds - info.start_seconds
    return replace(info, duration_seconds=min(seconds, info.duration_seconds or seconds))


def _kind(source: PathOrUrl, info: VideoInfo | None, realtime: bool) -> str:
    """Which of `SOURCES` a path or URL is; `info` is None for what is live."""
    lasting = info is not None and (info.finite or local_path(source) is not None)
    return "file" if lasting and not realtime else "live"


def _count(source: PathOrUrl, sampler: FrameSampler, stream: int | None, until_seconds: float | None) -> int | None:
    """How many frames will be seen together: positions and pictures are sized by that."""
    # Counting reads the file once without decoding it; a URL would be fetched twice.
    if local_path(source) is None:
        return None
    return sampler.together(count_frames(source, sampler.fps, sampler.max_frames, stream, until_seconds))


def _reading(config: Config, until_seconds: float | None, duration_seconds: float | None = None) -> LiveSettings:
    return LiveSettings(
        fps=sampler_of(config).fps,
        max_frames=config.max_frames,
        duration_seconds=duration_seconds,
        depth=config.prefetch,
        max_lag_seconds=config.max_lag_seconds,
        reconnect_seconds=config.reconnect_seconds,
        until_seconds=until_seconds,
        max_pixels=config.max_pixels,
        max_decoded=config.max_decoded,
    )


def _source_again(saved: Saved, source: PathOrUrl | Iterable[Frame] | None, config: Config) -> Source | None:
    """The source of a saved session, from where it was left."""
    known = saved.facts["source"]
    if source is not None and not isinstance(source, (str, os.PathLike)):
        if known is not None:
            rule = f"{saved.folder} watched a file or an address, which pushed frames cannot go on with"
            raise ConfigError(rule, "name it with source, or set session.source")
        return as_source(source)
    if source is not None:
        check_scheme(source, tuple(config.schemes.split(",")))
    if known is None:
        if source is not None:
            rule = f"the frames of {saved.folder} were pushed, they came from no source"
            raise ConfigError(rule, "leave the source out and push on, or set session.source")
        return None
    with saved.reading():
        left = ResumePoint(**known["left"]) if known["live"] else None
    if left is None:
        if source is not None and locate(source).live:
            rule = f"{known['address']} was watched before, {display_name(source)} is live"
            raise ConfigError(rule, "name the file, or open a session of its own")
        return ResumableVideo.resumed(known, source)
    if source is None:
        return Unopened(left)
    return LiveSource(source, _reading(config, left.until_seconds, left.duration_seconds), left.stream, left)
