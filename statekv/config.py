"""Every setting and its default, in one frozen, checked place."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from statekv.errors import ConfigError

CARRIES = ("attention", "recent", "sink_recent", "all", "random")
RECALLS = ("all", "recent", "sink_recent")
LAYOUTS = ("hf", "release")
KERNELS = ("auto", "naive", "blocked", "triton")

METHODS = {
    "statekv": ("attention", "all"),
    "full": ("all", "all"),
    "recency_window": ("recent", "all"),
    "streaming_llm": ("sink_recent", "sink_recent"),
    "random": ("random", "all"),
}


@dataclass(frozen=True)
class Config:
    """How a stream is watched and answered.

    Attributes:
        budget: tokens kept per layer and KV head in the carried cache (the paper's B).
        carry: which keys go on to the next step: attention (best key scores), recent, sink_recent, all, random.
        recall: which keys an answer sees: all, recent (the newest `budget`), sink_recent.
        sinks: tokens from the start of the stream that sink_recent keeps; they count towards the budget.
        pin_prefix: keep the prompt's prefix in the carried cache whatever its scores; it counts towards the budget.
        layout: prompt around the frames: hf (the checkpoint's processor) or release (the public StateKV code).
        fps: frames per second at most; None keeps every frame.
        max_frames: frames at most, spread over the video; None sets no cap.
        horizon: positions that RoPE is scaled for; None: the video's length where it is known, else the trained length.
        max_new_tokens: longest answer, in tokens.
        kernel: implementation of attention with key scores: auto, naive, blocked, triton.
        score_every: score keys with every n-th query of a step, counted from its last; 1, all, is the method.
        seed: of carry="random" and of sampled answers.
        prefetch: frames decoded ahead of the model.
        vision_batch: steps whose pictures pass the vision tower together while a source is watched.
        graph: on CUDA, replay recorded steps once the carried cache is full.

    Raises:
        ConfigError: a value outside its range, or an unknown name.
    """

    budget: int = 4096
    carry: str = "attention"
    recall: str = "all"
    sinks: int = 4
    pin_prefix: bool = False
    layout: str = "hf"
    fps: float | None = 1.0
    max_frames: int | None = None
    horizon: int | None = None
    max_new_tokens: int = 128
    kernel: str = "auto"
    score_every: int = 1
    seed: int = 0
    prefetch: int = 8
    vision_batch: int = 8
    graph: bool = True

    def __post_init__(self) -> None:
        for name, known in (("carry", CARRIES), ("recall", RECALLS), ("layout", LAYOUTS), ("kernel", KERNELS)):
            check_name(name, getattr(self, name), known)
        for name in ("budget", "max_frames", "horizon", "max_new_tokens", "score_every", "prefetch", "vision_batch"):
            _check_count(name, getattr(self, name), least=1)
        for name in ("sinks", "seed"):
            _check_count(name, getattr(self, name), least=0)
        if self.seed >= 2**63:
            raise ConfigError(f"seed is {self.seed}, but must be below 2^63", "give a smaller one")
        _check_rate(self.fps)
        for name, value in (("pin_prefix", self.pin_prefix), ("graph", self.graph)):
            if not isinstance(value, bool):
                raise ConfigError(f"{name} is {value!r}, but must be True or False", "leave it out for the default")
        if "sink_recent" in (self.carry, self.recall) and self.sinks >= self.budget:
            raise ConfigError(
                f"sinks is {self.sinks} with a budget of {self.budget}, but the sinks count towards the budget",
                "raise budget or lower sinks",
            )

    @classmethod
    def of(cls, method: str | None = None, **settings: Any) -> Config:
        """A configuration from a method's name and any settings; a dial set by hand wins over the method's.

        Raises:
            ConfigError: an unknown method or setting, or a value outside its range.
        """
        return cls().with_(method, **settings)

    def with_(self, method: str | None = None, **settings: Any) -> Config:
        """A copy with another method and other settings."""
        known = [field.name for field in fields(self)]
        for name in settings:
            check_name("setting", name, known)
        if method is not None:
            check_name("method", method, tuple(METHODS))
            carry, recall = METHODS[method]
            settings = {"carry": carry, "recall": recall, **settings}
        return replace(self, **settings)

    @property
    def method(self) -> str:
        """Name of the dials' setting; `carry+recall` where it has none."""
        dials = (self.carry, self.recall)
        return next((name for name, named in METHODS.items() if named == dials), "+".join(dials))


def check_name(what: str, value: object, known: tuple[str, ...] | list[str]) -> None:
    """Raise a ConfigError that lists the known names unless `value` is one of them."""
    if value not in known:
        raise ConfigError(f"unknown {what} {value!r}", f"known: {', '.join(known)}")


def _check_count(name: str, value: object, least: int) -> None:
    if value is None and name in ("max_frames", "horizon"):
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        rule = f"{name} is {value!r}, but must be a whole number of at least {least}"
        raise ConfigError(rule, f"give {least} or more")


def _check_rate(fps: object) -> None:
    number = isinstance(fps, (int, float)) and not isinstance(fps, bool)
    if fps is not None and not (number and 0 < fps < float("inf")):  # type: ignore[operator]
        raise ConfigError(f"fps is {fps!r}, but must be a number above 0", "leave it out for 1 frame per second")
