"""Every setting and its default, in one frozen, checked place."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from importlib import import_module
from typing import Any

from statekv.errors import ConfigError

CARRIES = ("attention", "recent", "sink_recent", "all", "random")
RECALLS = ("all", "recent", "sink_recent", "retrieve", "last_frames")
# Dials of carry="attention" beyond the paper; with their defaults they do nothing.
ATTENTION_DIALS = ("decay", "value_norms", "layer_slope", "pin_newest", "coverage")
RETRIEVED_POSITIONS = ("keep", "reindex")
ON_HORIZON = ("error", "compact")
BITS = (8, 4, 2)
CAPS = ("memory", "host_memory", "disk")
LAYOUTS = ("hf", "release")
KERNELS = ("auto", "naive", "blocked", "triton")
SCHEMES = ("file", "http", "https", "tcp", "udp", "rtp", "rtsp", "rtsps", "rtmp", "rtmps")

# What each method sets. All of it makes the method what it is, but for numbers, which only say how much.
METHODS: Mapping[str, Mapping[str, str | bool | int]] = {
    "statekv": {"carry": "attention", "recall": "all"},
    "full": {"carry": "all", "recall": "all"},
    "recency_window": {"carry": "recent", "recall": "all"},
    "streaming_llm": {"carry": "sink_recent", "recall": "sink_recent"},
    "random": {"carry": "random", "recall": "all"},
    # ReKV's sink is the prompt before the frames, however long that is, and not a number of first tokens.
    "rekv": {"carry": "recent", "recall": "retrieve", "pin_prefix": True},
    "statekv_retrieve": {"carry": "attention", "recall": "retrieve"},
    "last_frames": {"carry": "all", "recall": "last_frames"},
    "uniform": {"carry": "all", "recall": "all", "uniform": True, "max_frames": 64},
}


@dataclass(frozen=True)
class Config:
    """How a stream is watched and answered.

    Attributes:
        budget: tokens kept per layer and KV head in the carried cache (the paper's B).
        carry: which keys go on to the next step: attention (best key scores), recent, sink_recent, all, random.
        recall: which keys an answer sees: all, recent (the newest `budget`), sink_recent, retrieve (the steps that
            match the question best, chosen layer by layer), last_frames (the newest frames alone, encoded anew for
            each question; no frame enters the stream).
        sinks: tokens from the start of the stream that sink_recent keeps; they count towards the budget.
        pin_prefix: keep the prompt's prefix in the carried cache whatever its scores; it counts towards the budget.
        decay: what the score that a carried key had before counts beside its score in a new step, 0 … 1; 0 forgets
            it, 1 adds up.
        value_norms: multiply a key's score by the length (L2) of its value.
        layer_slope: the first layer's budget is `budget` · (1 + layer_slope), the last one's `budget` · (1 -
            layer_slope), those between lie on a line, so that the sum stays; between -1 and 1.
        pin_newest: newest steps whose keys stay carried whatever their scores; they count towards the budget.
        coverage: share of the budget (without a pinned prefix) that goes to a sample of the whole stream, drawn as
            carry="random" draws it, 0 … 1; the rest goes by score.
        retrieve: steps that recall="retrieve" shows to an answer in each layer, besides the text around the frames.
        retrieve_newest: newest steps that it shows besides those, whatever the question.
        retrieve_carried: whether it shows the carried keys too.
        retrieve_positions: positions of retrieved keys: keep (where they were seen, with gaps between them) or reindex
            (moved up to the question, as if the steps that are left out had never been).
        last_frames: frames that recall="last_frames" shows.
        uniform: spread max_frames over the whole video, and refuse a source whose length is unknown.
        layout: prompt around the frames: hf (the checkpoint's processor) or release (the public StateKV code).
        fps: frames per second at most; None keeps every frame.
        max_frames: frames at most, spread over the video; None sets no cap.
        horizon: positions that RoPE is scaled for; None: the video's length where it is known, else the trained length.
        on_horizon: what happens when the next step would pass the horizon: error, or compact (older steps move closer
            together, and the stream goes on); None: error for a file of known length, else compact.
        memory: cap on what one stream takes on the model's device, in bytes or as "8GiB" (docs/tiers.md); None: none.
        host_memory: cap on what moves from there to the host's memory; None: nothing does.
        disk: cap on what moves from there to files; None: nothing does.
        disk_folder: where these files lie; None: the system's folder for temporary files.
        bits: keys and values that leave the newest part of the device's memory are quantised: 8, 4 or 2; None: not.
        max_new_tokens: longest answer, in tokens.
        kernel: implementation of attention with key scores: auto, naive, blocked, triton.
        score_every: score keys with every n-th query of a step, counted from its last; 1, all, is the method.
        seed: of carry="random" and of sampled answers.
        prefetch: frames decoded ahead of the model.
        schemes: protocols of sources that may be opened, with commas.
        max_lag_seconds: how long a frame of a live source waits before a newer one pushes it out.
        reconnect_seconds: how long a live source that went away is waited for; 0: its end is the end.
        vision_batch: steps whose pictures pass the vision tower together while a source is watched.
        graph: on CUDA, replay recorded steps once the carried cache is full.
        pack: on a CPU in float32, step on a second copy of the weights that MKL has laid out, where memory allows it.

    Raises:
        ConfigError: a value outside its range, or an unknown name.
    """

    budget: int = 4096
    carry: str = "attention"
    recall: str = "all"
    sinks: int = 4
    pin_prefix: bool = False
    decay: float = 0.0
    value_norms: bool = False
    layer_slope: float = 0.0
    pin_newest: int = 0
    coverage: float = 0.0
    retrieve: int = 64
    retrieve_newest: int = 0
    retrieve_carried: bool = False
    retrieve_positions: str = "keep"
    last_frames: int = 4
    uniform: bool = False
    layout: str = "hf"
    fps: float | None = 1.0
    max_frames: int | None = None
    horizon: int | None = None
    on_horizon: str | None = None
    memory: int | str | None = None
    host_memory: int | str | None = None
    disk: int | str | None = None
    disk_folder: str | None = None
    bits: int | None = None
    max_new_tokens: int = 128
    kernel: str = "auto"
    score_every: int = 1
    seed: int = 0
    prefetch: int = 8
    schemes: str = ",".join(SCHEMES)
    max_lag_seconds: float = 2.0
    reconnect_seconds: float = 300.0
    vision_batch: int = 8
    graph: bool = True
    pack: bool = True

    def __post_init__(self) -> None:
        for name, known in _NAMES.items():
            if name != "on_horizon" or self.on_horizon is not None:
                check_name(name, getattr(self, name), known)
        for name in CAPS:
            if getattr(self, name) is not None:
                object.__setattr__(self, name, bytes_of(name, getattr(self, name)))  # "8GiB" and its bytes are equal
        if self.bits is not None and (isinstance(self.bits, bool) or self.bits not in BITS):
            raise ConfigError(f"bits is {self.bits!r}, but must be 8, 4 or 2", "leave it out to quantise nothing")
        for name, least in _COUNTS.items():
            _check_count(name, getattr(self, name), least)
        if self.seed >= 2**63:
            raise ConfigError(f"seed is {self.seed}, but must be below 2^63", "give a smaller one")
        _check_rate(self.fps)
        for scheme in self.schemes.split(","):
            check_name("scheme", scheme, SCHEMES)
        for name in ("max_lag_seconds", "reconnect_seconds"):
            _check_seconds(name, getattr(self, name))
        for name, (least, most) in _SHARES.items():
            _check_share(name, getattr(self, name), least, most)
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                rule = f"{name} is {getattr(self, name)!r}, but must be True or False"
                raise ConfigError(rule, "leave it out for the default")
        for rule, way_out in self._contradictions():
            raise ConfigError(rule, way_out)

    def _contradictions(self) -> Iterator[tuple[str, str]]:
        """Settings that do not go together: the rule, and the way out."""
        if "sink_recent" in (self.carry, self.recall) and self.sinks >= self.budget:
            yield (
                f"sinks is {self.sinks} with a budget of {self.budget}, but the sinks count towards the budget",
                "raise budget or lower sinks",
            )
        for name in ATTENTION_DIALS:
            value = getattr(self, name)
            if self.carry != "attention" and value:
                rule = f"{name} is {value!r} with carry {self.carry!r}, but it is a dial of carry 'attention'"
                yield rule, f"set carry to 'attention', or leave {name} out"
        if self.budget * (1 - abs(self.layer_slope)) < 1:
            rule = (
                f"layer_slope is {self.layer_slope} with a budget of {self.budget}, which leaves a layer without a key"
            )
            yield rule, "raise budget, or bring layer_slope nearer to 0"
        if self.recall == "retrieve" and self.retrieve_carried:
            if self.carry == "all":
                rule = "retrieve_carried is True with carry 'all', but where all keys are carried there is no choice"
                yield rule, "set recall to 'all', or retrieve_carried to False"
            if self.retrieve_positions == "reindex":
                rule = (
                    "retrieve_carried is True with retrieve_positions 'reindex', but carried keys keep their positions"
                )
                yield rule, "set retrieve_positions to 'keep', or retrieve_carried to False"
        if self.recall == "last_frames" and self.carry != "all":
            rule = (
                f"carry is {self.carry!r} with recall 'last_frames', but frames that are encoded anew carry nothing on"
            )
            yield rule, "set carry to 'all', or use the method last_frames"
        if self.uniform and self.max_frames is None:
            yield "max_frames is None, but uniform spreads a number of frames over the video", "give max_frames"

        for name in ("host_memory", "disk", "bits"):
            value = getattr(self, name)
            if value is not None and self.memory is None:
                rule = (
                    f"{name} is {_shown(name, value)} without memory, but only what memory has no room for goes there"
                )
                yield rule, f"give memory, or leave {name} out"
        if self.disk_folder is not None and self.disk is None:
            yield f"disk_folder is {self.disk_folder!r} without disk, so that no file goes there", "give disk"
        if self.memory is not None and self.carry == "all":
            rule = f"memory is {_shown('memory', self.memory)} with carry 'all', but such steps need all of it"
            yield rule, "choose a method with a budget, or leave memory out"
        if self.memory is not None and self.recall in ("recent", "sink_recent"):
            rule = (
                f"memory is {_shown('memory', self.memory)} with recall {self.recall!r}, which shows the newest alone"
            )
            yield rule, "set recall to 'all' or 'retrieve', or leave memory out"

    @classmethod
    def of(cls, method: str | None = None, **settings: Any) -> Config:
        """A configuration from a method's name and any settings; a dial set by hand wins over the method's.

        Raises:
            ConfigError: an unknown method or setting, or a value outside its range.
        """
        return cls().with_(method, **settings)

    def with_(self, method: str | None = None, **settings: Any) -> Config:
        """A copy with another method and other settings; what the former method had set goes with it."""
        known = [field.name for field in fields(self)]
        for name in settings:
            check_name("setting", name, known)
        if method is not None:
            check_name("method", method, tuple(METHODS))
            settings = {**self._of_method(), **METHODS[method], **settings}
        return replace(self, **settings)

    @property
    def method(self) -> str:
        """Name of the dials' setting; `carry+recall` where it has none."""
        found = [
            name
            for name, settings in METHODS.items()
            if all(getattr(self, field) == value for field, value in settings.items() if field not in _COUNTS)
        ]
        # Uniform sampling is full attention too: the more a method asks for, the more its name says.
        return max(found, key=lambda name: len(METHODS[name]), default=f"{self.carry}+{self.recall}")

    def _of_method(self) -> dict[str, Any]:
        """Defaults of what this configuration has from its method."""
        taken = METHODS.get(self.method, {})
        return {f.name: f.default for f in fields(self) if f.name in taken and getattr(self, f.name) == taken[f.name]}


_NAMES = {
    "carry": CARRIES,
    "recall": RECALLS,
    "retrieve_positions": RETRIEVED_POSITIONS,
    "layout": LAYOUTS,
    "on_horizon": ON_HORIZON,
    "kernel": KERNELS,
}
_COUNTS = {
    **dict.fromkeys(
        ("budget", "max_frames", "horizon", "max_new_tokens", "score_every", "prefetch", "vision_batch"), 1
    ),
    **dict.fromkeys(("retrieve", "last_frames"), 1),
    **dict.fromkeys(("sinks", "seed", "retrieve_newest", "pin_newest"), 0),
}
_SHARES = {"decay": (0, 1), "layer_slope": (-1, 1), "coverage": (0, 1)}
_SWITCHES = ("pin_prefix", "value_norms", "retrieve_carried", "uniform", "graph", "pack")


def _shown(name: str, value: int | str | None) -> str:
    return told(value) if name in CAPS and isinstance(value, int) else str(value)


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


def _check_share(name: str, value: object, least: int, most: int) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and least <= value <= most):  # type: ignore[operator]
        raise ConfigError(
            f"{name} is {value!r}, but must be a number from {least} to {most}", "leave it out for the default"
        )


def _check_seconds(name: str, value: object) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and 0 <= value < float("inf")):  # type: ignore[operator]
        raise ConfigError(f"{name} is {value!r}, but must be a number of at least 0", "leave it out for the default")


def _check_rate(fps: object) -> None:
    number = isinstance(fps, (int, float)) and not isinstance(fps, bool)
    if fps is not None and not (number and 0 < fps < float("inf")):  # type: ignore[operator]
        raise ConfigError(f"fps is {fps!r}, but must be a number above 0", "leave it out for 1 frame per second")


_UNITS = {"": 1, "B": 1, **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)}}
_UNITS |= {f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", start=1)}
_BY_LOWER = {unit.lower(): factor for unit, factor in _UNITS.items()}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def bytes_of(name: str, amount: int | str) -> int:
    """Bytes of an amount.

    Args:
        name: of the setting, for the error.
        amount: bytes, or a number with a unit: B, KB, MB, GB, TB (powers of 1000), KiB, MiB, GiB, TiB (of 1024).

    Raises:
        ConfigError: not an amount, or nothing.
    """
    found = _AMOUNT.fullmatch(amount) if isinstance(amount, str) else None
    if found is not None and found[2].lower() in _BY_LOWER:
        amount = int(float(found[1]) * _BY_LOWER[found[2].lower()])
    if isinstance(amount, bool) or not isinstance(amount, int) or amount < 1:
        raise ConfigError(f"{name} is {amount!r}, but must be an amount of memory", "write it like 8GiB or 500MB")
    return amount


def told(count: int) -> str:
    """A count of bytes with a unit that suits it."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if count >= _UNITS[unit]:
            return f"{count / _UNITS[unit]:.1f} {unit}"
    return f"{count} B"


_SPELLING = re.compile(r"\s*(?P<name>\w+|[\w.]+:\w+)\s*(?P<call>\(.*\))?\s*", re.DOTALL)
_HOW_TO_SPELL = "write name, name(parameter=value) or package.module:Class(parameter=value)"


def read_named(spelling: str, table: Mapping[str, Any], what: str) -> tuple[str, dict[str, Any]]:
    """Name and parameters of a method as a setting spells it; nothing is imported.

    Args:
        spelling: a name of the table or `package.module:Class`, with `(parameter=literal, …)` behind it or without.
        table: known names.
        what: the setting, for the error.

    Raises:
        ConfigError: it cannot be read, or the name is unknown.
    """
    found = _SPELLING.fullmatch(spelling)
    try:
        if found is None:
            raise ValueError
        call = ast.parse(f"_{found['call'] or '()'}", mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)) or call.args:
            raise ValueError
        parameters = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (ValueError, SyntaxError):
        raise ConfigError(f"{what} is {spelling!r}, which cannot be read", _HOW_TO_SPELL) from None
    if ":" not in found["name"]:
        check_name(what, found["name"], [*table, "package.module:Class"])
    return found["name"], parameters


def load_named(spelling: object, table: Mapping[str, str | type[Any]], what: str, kind: type[Any]) -> Any:
    """An instance of the method that a setting spells, or the object that it holds.

    Only subclasses of `kind` are called, so that a spelling from a file cannot call anything else.

    Args:
        spelling: see `read_named`; an instance of `kind` is returned as it is.
        table: classes by name, or where they are: `package.module:Class`.
        what: the setting, for the error.
        kind: what it must be an instance of.

    Raises:
        ConfigError: it cannot be read or found, is no `kind`, or does not take such parameters.
    """
    if not isinstance(spelling, str):
        if not isinstance(spelling, kind):
            rule = f"{what} is {_one_line(repr(spelling))}, but must be a {kind.__name__}"
            raise ConfigError(rule, f"give an instance of a subclass of {kind.__module__}.{kind.__name__}, or its name")
        return spelling
    name, parameters = read_named(spelling, table, what)
    found = _class_at(table.get(name, name), f"{what} is {spelling!r}")
    if not (isinstance(found, type) and issubclass(found, kind)):
        rule = f"{what} is {spelling!r}, which is no {kind.__name__}"
        raise ConfigError(rule, f"derive it from {kind.__module__}.{kind.__name__}")
    try:
        inspect.signature(found).bind(**parameters)
    except TypeError as error:
        known = ", ".join(inspect.signature(found).parameters) or "it has none"
        raise ConfigError(f"{what} is {spelling!r}: {error}", f"parameters: {known}") from None
    try:
        return found(**parameters)
    except (TypeError, ValueError) as error:
        rule = f"{what} is {spelling!r}, which {found.__name__} refuses: {_one_line(str(error))}"
        raise ConfigError(rule, "give it other parameters") from error


def spell(method: object, table: Mapping[str, str | type[Any]]) -> str:
    """What `load_named` makes an equal instance of; parameters are attributes of their own names.

    Raises:
        ConfigError: a parameter that the instance does not keep, or that is no literal.
    """
    kind = type(method)
    place = f"{kind.__module__}:{kind.__qualname__}"
    name = next((name for name, known in table.items() if known in (kind, place)), place)
    parameters = []
    for parameter in inspect.signature(kind).parameters:
        try:
            value = getattr(method, parameter)
            if ast.literal_eval(repr(value)) != value:
                raise ValueError
        except (AttributeError, ValueError, SyntaxError):
            rule = f"{kind.__name__} does not keep its parameter {parameter!r} as a number, string, list or the like"
            raise ConfigError(rule, "keep it in an attribute of the same name, so that a save can note it") from None
        parameters.append(f"{parameter}={value!r}")
    return f"{name}({', '.join(parameters)})"


def _class_at(place: str | type[Any], told: str) -> Any:
    if not isinstance(place, str):
        return place
    module, name = place.split(":")
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise ConfigError(f"{told}, but {module} needs {error.name}", "install it") from None
        raise ConfigError(f"{told}, but there is no module {error.name}", "install it, or set PYTHONPATH") from None
    except AttributeError:
        raise ConfigError(f"{told}, but {module} has no {name}", "look into the module") from None
    except Exception as error:
        rule = f"{told}, but {module} cannot be imported: {type(error).__name__}: {_one_line(str(error))}"
        raise ConfigError(rule, "mend the module") from error


def _one_line(text: str) -> str:
    return " ".join(text.split())
