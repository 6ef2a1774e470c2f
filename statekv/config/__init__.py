"""Every setting, declared once: default, help, range, and all that follows from them, in one frozen, checked place.

The options of the commands, their pages in the docs, the JSON schema, what may differ in a batch and what a restore may
change derive from the fields of `Config`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from statekv.config.spelling import check_name, read_named, spell
from statekv.errors import ConfigError

# Where each policy lives; beside them there is "all", which carries every key. Strings, so that torch is not imported.
CARRIES: Mapping[str, str] = {
    "attention": "statekv.cache.policies.attention:Attention",
    "recent": "statekv.cache.policies.recent:Recent",
    "sink_recent": "statekv.cache.policies.recent:SinkRecent",
    "random": "statekv.cache.policies.random:Random",
    "key_norm": "statekv.cache.policies.key_norm:KeyNorm",
    "accumulated": "statekv.cache.policies.accumulated:Accumulated",
    "caote": "statekv.cache.policies.caote:Caote",
    "ada_kv": "statekv.cache.policies.ada_kv:AdaKV",
    "stochastic": "statekv.cache.policies.stochastic:Stochastic",
    "weighted": "statekv.cache.policies.weighted:Weighted",
}
_WITHOUT_ATTENTION = ("all", "recent", "sink_recent", "random", "key_norm")
REDUCERS: Mapping[str, str] = {"static": "statekv.reduce.static:Static"}
GATES: Mapping[str, str] = {}  # none is built in
WINDOWS = ("recent", "sink_recent")  # recalls that go by age
RECALLS = ("all", *WINDOWS, "retrieve", "last_frames")
SCHEMES = ("file", "http", "https", "tcp", "udp", "rtp", "rtsp", "rtsps", "rtmp", "rtmps")

# What each method sets. All of it makes the method what it is, but for whole numbers, which only say how much.
METHODS: Mapping[str, Mapping[str, str | bool | int]] = {
    "statekv": {"carry": "attention", "recall": "all"},
    "full": {"carry": "all", "recall": "all"},
    "recency_window": {"carry": "recent", "recall": "all"},
    "streaming_llm": {"carry": "sink_recent", "recall": "sink_recent"},
    "random": {"carry": "random", "recall": "all"},
    # ReKV's sink is the prompt before the frames, however long that is, and not a number of first tokens.
    "rekv": {"carry": "recent", "recall": "retrieve", "pin_prefix": True},
    "statekv_weighted": {"carry": "weighted", "recall": "all"},
    "statekv_retrieve": {"carry": "attention", "recall": "retrieve"},
    "last_frames": {"carry": "all", "recall": "last_frames"},
    "uniform": {"carry": "all", "recall": "all", "uniform": True, "max_frames": 64},
}


class Kind(NamedTuple):
    """What a setting may be.

    Attributes:
        option: what the command line reads.
        schema: JSON schema of it.
        read: from the setting's name and a value to the value as it is kept; raises ConfigError where it is none of
            this kind.
        known: all there are, where there are so few.
    """

    option: type
    schema: Mapping[str, Any]
    read: Callable[[str, Any], Any]
    known: tuple[str, ...] = ()


def _one_of(*known: str) -> Kind:
    def read(name: str, value: Any) -> Any:
        check_name(f"`{name}`", value, known)
        return value

    return Kind(str, {"enum": known}, read, known)


def _some_of(known: tuple[str, ...]) -> Kind:
    def read(name: str, value: Any) -> Any:
        if not isinstance(value, str):
            rule = f"`{name}` is {value!r}, but must be names with commas between"
            raise ConfigError(rule, f"known: {', '.join(known)}")
        for part in value.split(","):
            check_name(name.removesuffix("s"), part, known)
        return value

    return Kind(str, {"type": "string"}, read)


def _whole(least: int, bits: int | None = None) -> Kind:
    def read(name: str, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            rule = f"`{name}` is {value!r}, but must be a whole number of at least {least}"
            raise ConfigError(rule, f"give {least} or more")
        if bits is not None and value >= 2**bits:
            raise ConfigError(f"`{name}` is {value}, but must be below 2^{bits}", "give a smaller one")
        return value

    return Kind(int, {"type": "integer", "minimum": least} | ({} if bits is None else {"maximum": 2**bits - 1}), read)


def _checked(
    option: type, schema: Mapping[str, Any], told: str, fine: Callable[[Any], bool], way_out: str = "for the default"
) -> Kind:
    def read(name: str, value: Any) -> Any:
        if not fine(value):
            raise ConfigError(f"`{name}` is {value!r}, but must be {told}", f"leave it out {way_out}")
        return value

    return Kind(option, schema, read)


def _number(told: str, schema: Mapping[str, Any], fine: Callable[[float], bool]) -> Kind:
    def is_fine(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and fine(value)

    return _checked(float, {"type": "number", **schema}, f"a number {told}", is_fine)


def _share(least: int, most: int) -> Kind:
    told, schema = f"from {least} to {most}", {"minimum": least, "maximum": most}
    return _number(told, schema, lambda value: least <= value <= most)


def _named(table: Mapping[str, str], listed: bool = False) -> Kind:
    """A method by its spelling, or the object; whether there is such a class is found when it is loaded."""

    def read(name: str, value: Any) -> Any:
        if isinstance(value, type):
            rule = f"`{name}` is the class {value.__name__}"
            raise ConfigError(rule, f"give an instance: {value.__name__}(…)")
        if isinstance(value, str):
            read_named(value, table, f"`{name}`")
        else:
            spell(value, table)
        return value

    return Kind(str, {"type": "string"}, read, tuple(table) if listed else ())


SWITCH = _checked(bool, {"type": "boolean"}, "True or False", lambda value: isinstance(value, bool))
RATE = _number("above 0", {"exclusiveMinimum": 0}, lambda value: 0 < value < float("inf"))
SECONDS = _number("of at least 0", {"minimum": 0}, lambda value: 0 <= value < float("inf"))
BYTES = Kind(str, {"type": ["integer", "string"]}, lambda name, value: bytes_of(f"`{name}`", value))
BITS = _checked(
    int,
    {"enum": (8, 4, 2)},
    "8, 4 or 2",
    lambda value: type(value) is int and value in (8, 4, 2),
    "to quantise nothing",
)
TEXT = _checked(str, {"type": "string"}, "a path", lambda value: isinstance(value, (str, os.PathLike)))


class Needs(NamedTuple):
    """What has to stand beside a setting for it to mean something.

    Attributes:
        other: the setting that decides.
        met: whether it does, among all values by name.
        told: what the other has to be, in words.
        way_out: how it becomes that, in words.
    """

    other: str
    met: Callable[[Mapping[str, Any]], bool]
    told: str
    way_out: str


def _given(other: str) -> Needs:
    return Needs(other, lambda values: values[other] is not None, f"`{other}`", f"give `{other}`")


def _goes_by_attention(values: Mapping[str, Any]) -> bool:
    """Of a policy that is not loaded yet, but for those that are known, it is not known: `check_attention`."""
    carry = values["carry"]
    if isinstance(carry, str):
        return carry.partition("(")[0].strip() not in _WITHOUT_ATTENTION
    return bool(carry.needs_attention) if hasattr(carry, "needs_attention") else True


ATTENTION = Needs("carry", _goes_by_attention, "a `carry` that goes by attention", "set `carry` to 'attention'")
BOUNDED = Needs("carry", lambda values: values["carry"] != "all", "a `carry` that leaves keys behind", "change `carry`")
# Two recalls go by the budget too, whatever is carried.
BUDGETED = BOUNDED._replace(met=lambda values: BOUNDED.met(values) or values["recall"] in WINDOWS)
SINKING = BOUNDED._replace(met=lambda values: BOUNDED.met(values) or values["recall"] == "sink_recent")


# Frames that are spread over the whole video are as far apart as that takes.
SPACED = Needs("uniform", lambda values: not values["uniform"], "no `uniform`", "leave `uniform` out")


def _recalled(recall: str) -> Needs:
    told = f"`recall` {recall!r}"
    return Needs("recall", lambda values: values["recall"] == recall, told, f"set `recall` to {recall!r}")


RETRIEVING = _recalled("retrieve")

# What frames come from, in words; a file that is shown as if it were live is live.
SOURCES = {"file": "a file", "live": "a live source", "pushed": "pushed frames", "processed": "a processor's outputs"}
_READ = ("file", "live")


class Scope(NamedTuple):
    """Where a setting may differ.

    Attributes:
        of_one_stream: streams may differ in it and yet step as one batch, because it is of sources, answers, the
            detailed cache, or of how a step alone is run.
        on_restore: a restored session may have it anew, because it is of answers, of how fast things go, or of the
            source.
        planned: but not where memory has a cap, for the plan that shares the memory out has counted on it.
    """

    of_one_stream: bool = False
    on_restore: bool = False
    planned: bool = False


# A setting that comes to exist keeps streams apart and stays as it is, until somebody has thought about it.
OF_THE_STEP = Scope()
OF_THE_STREAM = Scope(of_one_stream=True)
FREE = Scope(of_one_stream=True, on_restore=True)


class Setting(NamedTuple):
    """A field of `Config`, and all that is known of it.

    Attributes:
        name: of the field.
        default: the value where none is given.
        optional: whether it may be None.
        help: what it is.
        kind: what it may be.
        panel: where the help of the commands shows it.
        needs: that without which it means nothing; None: it always does.
        scope: where it may differ.
        sources: of `SOURCES`, with which it means something.
    """

    name: str
    default: Any
    optional: bool
    help: str
    kind: Kind
    panel: str
    needs: Needs | None = None
    scope: Scope = OF_THE_STEP
    sources: tuple[str, ...] = tuple(SOURCES)

    @property
    def option(self) -> str:
        """As the command line has it: --max-frames."""
        return "--" + self.name.replace("_", "-")

    @property
    def description(self) -> str:
        """The help, and the names that are known."""
        return f"{self.help} One of: {', '.join(self.kind.known)}." if self.kind.known else self.help

    def shown(self, value: Any) -> str:
        """A value of it, in words."""
        return told(value) if self.kind is BYTES and isinstance(value, int) else repr(value)

    def may_change(self, capped: bool) -> bool:
        """Whether a restored session may have it anew; `capped`: whether its memory has a cap."""
        return self.scope.on_restore and not (capped and self.scope.planned)


class _About(NamedTuple):
    """A field of `Config` by its help, behind which all else that is known of it stands."""

    help: str

    def __call__(
        self,
        default: Any,
        kind: Kind,
        panel: str,
        scope: Scope = OF_THE_STEP,
        needs: Needs | None = None,
        sources: tuple[str, ...] = tuple(SOURCES),
    ) -> Any:
        known = {"help": self.help, "kind": kind, "panel": panel, "needs": needs, "scope": scope, "sources": sources}
        return field(default=default, metadata=known)


@dataclass(frozen=True, repr=False)
class Config:
    """How a stream is watched and answered.

    Raises:
        ConfigError: a value outside its range, an unknown name, or settings that do not go together.
    """

    budget: int = _About("Tokens carried per layer and KV head: the paper's B.")(
        4096, _whole(1), "Method", needs=BUDGETED
    )
    carry: Any = _About(  # noqa: RUF009 (`field`, as for the others)
        "Which keys go on to the next step: a name, a class of your own as package.module:Class, either of them with "
        "(parameter=value) behind it, or in Python an object."
    )("attention", _named({**CARRIES, "all": ""}, listed=True), "Method")
    recall: str = _About(
        "Which keys an answer sees: all, the newest of the budget with or without sinks, the steps that match the "
        "question best, or those of the newest frames alone."
    )("all", _one_of(*RECALLS), "Method", OF_THE_STREAM)
    sinks: int | None = _About(
        "First tokens of the stream that stay carried, and that recall sink_recent shows; they count towards the "
        "budget. By default what the carry says: 4 for sink_recent, random and weighted, else 0."
    )(None, _whole(0), "Method", needs=SINKING)
    pin_prefix: bool = _About(
        "Carry the prompt's prefix whatever its scores; it counts towards the budget. Some methods do."
    )(False, SWITCH, "Method", needs=BOUNDED)
    decay: float = _About(
        "What the score that a carried key had before counts beside its score in a new step: 0 forgets it, 1 adds up."
    )(0.0, _share(0, 1), "Method", needs=ATTENTION)
    value_norms: bool = _About("Multiply a key's score by the length (L2) of its value.")(
        False, SWITCH, "Method", needs=BOUNDED
    )
    layer_slope: float = _About(
        "Share by which the first layer's budget is above the mean and the last one's below it; those between lie on a "
        "line."
    )(0.0, _share(-1, 1), "Method", needs=BOUNDED)
    pin_newest: int = _About(
        "Newest steps whose keys stay carried whatever their scores; they count towards the budget."
    )(0, _whole(0), "Method", needs=BOUNDED)
    coverage: float = _About(
        "Share of the budget, without a pinned prefix, that goes to a random sample of the whole stream."
    )(0.0, _share(0, 1), "Method", needs=BOUNDED)
    reduce: str | object | None = _About(
        "Which tokens of a step go on to the language model: static, static(threshold=0.1), package.module:Class, or a "
        "statekv.reduce.base.Reducer; by default all."
    )(None, _named(REDUCERS), "Method", OF_THE_STREAM)
    retrieve: int = _About(
        "Steps that recall retrieve shows to an answer, chosen in each layer, besides the text around the frames."
    )(64, _whole(1), "Answers", FREE._replace(planned=True), needs=RETRIEVING)
    retrieve_newest: int = _About("Newest steps that recall retrieve shows besides those, whatever the question.")(
        0, _whole(0), "Answers", FREE._replace(planned=True), needs=RETRIEVING
    )
    retrieve_carried: bool = _About("Let recall retrieve show the carried keys too.")(
        False, SWITCH, "Answers", OF_THE_STREAM, needs=RETRIEVING
    )
    retrieve_positions: str = _About(
        "Positions of retrieved keys: where they were seen, with gaps between them, or moved up to the question, as if "
        "the steps that are left out had never been."
    )("keep", _one_of("keep", "reindex"), "Answers", OF_THE_STREAM, needs=RETRIEVING)
    last_frames: int = _About(
        "Newest frames that recall last_frames shows, encoded anew for each question; no frame enters the stream."
    )(4, _whole(1), "Answers", OF_THE_STREAM, needs=_recalled("last_frames"))
    uniform: bool = _About("Spread max_frames over the whole video, and refuse a source whose length is unknown.")(
        False, SWITCH, "Source", OF_THE_STREAM
    )
    gate: str | object | None = _About(
        "Which frames are worth encoding: package.module:Class, or a statekv.video.FrameGate; by default all."
    )(None, _named(GATES), "Source", OF_THE_STREAM, sources=(*_READ, "pushed"))
    layout: str = _About("Prompt around the frames: the checkpoint's processor's, or that of the public StateKV code.")(
        "hf", _one_of("hf", "release"), "Prompt", OF_THE_STREAM
    )
    fps: float | None = _About("Frames per second at most.")(
        1.0, RATE, "Source", OF_THE_STREAM, needs=SPACED, sources=_READ
    )
    max_frames: int | None = _About("Frames at most, spread over the video.")(
        None, _whole(1), "Source", OF_THE_STREAM, sources=_READ
    )
    max_pixels: int = _About("Pixels of a picture at most; 8K has 33 million.")(
        50_000_000, _whole(1), "Source", FREE, sources=_READ
    )
    max_decoded: int = _About("Frames of a file that are decoded at most, kept or not.")(
        10_000_000, _whole(1), "Source", FREE, sources=_READ
    )
    horizon: int | None = _About(
        "Positions that RoPE is scaled for; by default the video's length where it is known, else the trained length."
    )(None, _whole(1), "Prompt", OF_THE_STREAM)
    on_horizon: str | None = _About(
        "When the next step would pass the horizon: stop, or move older steps closer together and go on; by default "
        "compact, but error for a file whose horizon is given."
    )(None, _one_of("error", "compact"), "Prompt", OF_THE_STREAM)
    memory: int | str | None = _About(
        "Most that one stream may take on the model's device, in bytes or as 8GiB, 500MB; by default there is no cap."
    )(None, BYTES, "Memory", OF_THE_STREAM)
    host_memory: int | str | None = _About("Most that moves from there to the host's memory; nothing if left out.")(
        None, BYTES, "Memory", OF_THE_STREAM, _given("memory")
    )
    disk: int | str | None = _About("Most that moves from there to files; nothing if left out.")(
        None, BYTES, "Memory", OF_THE_STREAM, _given("memory")
    )
    disk_folder: str | None = _About("Where these files lie; by default among the system's temporary files.")(
        None, TEXT, "Memory", FREE, _given("disk")
    )
    bits: int | None = _About("Quantise what leaves the newest part of the device's memory: 8, 4 or 2.")(
        None, BITS, "Memory", OF_THE_STREAM, _given("memory")
    )
    max_new_tokens: int = _About("Longest answer, in tokens.")(128, _whole(1), "Answers", FREE)
    kernel: str = _About("Implementation of attention with key scores.")(
        "auto", _one_of("auto", "naive", "blocked", "triton"), "Speed", Scope(on_restore=True), needs=ATTENTION
    )
    score_every: int = _About(
        "Score keys with every n-th query of a step, counted from its last; 1, all, is the method."
    )(1, _whole(1), "Method", needs=ATTENTION)
    seed: int = _About("Of what is drawn: carry random, coverage, sampled answers.")(0, _whole(0, bits=63), "Method")
    prefetch: int = _About("Frames decoded ahead of the model.")(8, _whole(1), "Speed", FREE, sources=_READ)
    schemes: str = _About("Protocols of sources that may be opened, with commas.")(
        ",".join(SCHEMES), _some_of(SCHEMES), "Source", FREE, sources=_READ
    )
    max_lag_seconds: float = _About("Seconds that a frame of a live source waits before newer ones push it out.")(
        2.0, SECONDS, "Source", FREE, sources=("live",)
    )
    reconnect_seconds: float = _About(
        "Seconds that a live source that went away is waited for; 0: its end is the end."
    )(300.0, SECONDS, "Source", FREE, sources=("live",))
    vision_batch: int = _About("Steps whose pictures pass the vision tower together while a source is watched.")(
        8, _whole(1), "Speed", FREE
    )
    graph: bool = _About("On CUDA, replay recorded steps once the carried cache is full.")(True, SWITCH, "Speed", FREE)
    _method: str = field(default="", compare=False)  # the name that it was made with; `replace` hands it on

    def __post_init__(self) -> None:
        for setting in SETTINGS.values():
            value = getattr(self, setting.name)
            if not (value is None and setting.optional):
                object.__setattr__(self, setting.name, setting.kind.read(setting.name, value))
        for rule, way_out in (*self._without_meaning(), *self._contradictions()):
            raise ConfigError(rule, way_out)
        object.__setattr__(self, "_method", _name_of(self.settings, self._method))

    def _without_meaning(self) -> Iterator[tuple[str, str]]:
        """Settings that mean nothing beside the others: the rule, and the way out."""
        values = self.settings
        for setting in SETTINGS.values():
            if setting.needs is not None and not setting.needs.met(values):
                yield from _refusal(setting, setting.needs, values)

    def _contradictions(self) -> Iterator[tuple[str, str]]:
        """Settings that do not go together: the rule, and the way out."""
        sinks = self.recalled_sinks if "sink_recent" in (self.carry, self.recall) else self.sinks or 0
        if sinks and sinks >= self.budget:
            rule = f"`sinks` is {sinks} with a `budget` of {self.budget}, but the sinks count towards the budget"
            yield rule, "raise `budget` or lower `sinks`"
        if self.budget * (1 - abs(self.layer_slope)) < 1:
            slope = f"`layer_slope` is {self.layer_slope} with a `budget` of {self.budget}"
            yield f"{slope}, which leaves a layer without a key", "raise `budget`, or bring `layer_slope` nearer to 0"
        if self.recall == "retrieve" and self.retrieve_carried and self.carry == "all":
            rule = "`retrieve_carried` is True with `carry` 'all', but where all keys are carried there is no choice"
            yield rule, "set `recall` to 'all', or `retrieve_carried` to False"
        if self.recall == "retrieve" and self.retrieve_carried and self.retrieve_positions == "reindex":
            rule = "`retrieve_carried` is True with `retrieve_positions` 'reindex', but carried keys keep their own"
            yield rule, "set `retrieve_positions` to 'keep', or `retrieve_carried` to False"
        if self.recall == "last_frames" and self.carry != "all":
            rule = f"`carry` is {self.carry!r} with `recall` 'last_frames', but frames encoded anew carry nothing on"
            yield rule, "set `carry` to 'all', or use the method last_frames"
        if self.uniform and self.max_frames is None:
            rule = "`max_frames` is None, but `uniform` spreads a number of frames over the video"
            yield rule, "give `max_frames`"
        if self.memory is not None and self.carry == "all":
            rule = (
                f"`memory` is {SETTINGS['memory'].shown(self.memory)} with `carry` 'all', but such steps need all of it"
            )
            yield rule, "choose a method with a `budget`, or leave `memory` out"
        for name in ("host_memory", "disk", "bits") if self.recall in WINDOWS else ():
            if (value := getattr(self, name)) is not None:
                rule = (
                    f"`{name}` is {SETTINGS[name].shown(value)} with `recall` {self.recall!r}, of which nothing moves"
                )
                yield rule, f"set `recall` to 'all' or 'retrieve', or leave `{name}` out"

    @property
    def recalled_sinks(self) -> int:
        """First tokens that recall="sink_recent" shows."""
        return 4 if self.sinks is None else self.sinks

    @classmethod
    def of(cls, method: str | None = None, **settings: Any) -> Config:
        """A configuration from a method's name and any settings; a dial set by hand wins over the method's.

        Raises:
            ConfigError: an unknown method or setting, or a value outside its range.
        """
        return cls().with_(method, **settings)

    @classmethod
    def of_facts(cls, facts: Mapping[str, Any]) -> Config:
        """What `facts` has written down.

        Version 0.1 wrote no method, which is told from the settings, and settings that meant nothing beside the others.
        Sinks were of sink_recent alone.
        """
        values = {name: setting.default for name, setting in SETTINGS.items()} | dict(facts)
        if "method" not in facts and "sink_recent" not in (values["carry"], values["recall"]):
            values["sinks"] = 0 if values["carry"] == "random" else None
        method = values.pop("method", "")
        return cls(**_without_idle(values), _method=method)

    def with_(self, method: str | None = None, **settings: Any) -> Config:
        """A copy with another method and other settings.

        What the former method had set goes with it, and so does what means nothing any more beside the new ones. Of
        these themselves all must mean something.
        """
        for name in settings:
            check_name("setting", name, tuple(SETTINGS))
        values = self.settings
        if method is not None:
            check_name("method", method, tuple(METHODS))
            values |= self._of_method() | dict(METHODS[method])
        return Config(**_without_idle(values | settings, but=settings), _method=method or self._method)

    def fitting(self, **settings: Any) -> dict[str, Any]:
        """Those of these settings that would mean something here: what several methods can be given at once."""
        values = _without_idle(self.settings | settings)
        return {name: value for name, value in settings.items() if _means(SETTINGS[name], values)}

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting by its name."""
        return {name: getattr(self, name) for name in SETTINGS}

    @property
    def opening(self) -> dict[str, Any]:
        """What `Engine.open` makes this configuration of, its name included, whatever the engine's own is."""
        return {**self.settings, "method": self.method if self.method in METHODS else None}

    @property
    def facts(self) -> dict[str, Any]:
        """The method and every setting, for JSON; a policy, a reducer and a gate are spelled."""
        tables = {"carry": CARRIES, "reduce": REDUCERS, "gate": GATES}
        given = {name: value for name in tables if not isinstance(value := getattr(self, name), str | None)}
        spelled = {name: spell(value, tables[name]) for name, value in given.items()}
        return {"method": self.method, **self.settings, **spelled}

    @property
    def method(self) -> str:
        """The method that it was made with, for as long as it is that: numbers and what the method leaves open may
        differ. Else the method that its dials make, or `carry+recall`."""
        return self._method

    def _of_method(self) -> dict[str, Any]:
        """Defaults of what this configuration has from its method."""
        taken = METHODS.get(self.method, {})
        return {name: SETTINGS[name].default for name, value in taken.items() if getattr(self, name) == value}

    def __repr__(self) -> str:
        """`Config.of('rekv', budget=99)`: the method, and what differs from it and from the defaults."""
        named = METHODS.get(self.method, {})
        plain = {name: setting.default for name, setting in SETTINGS.items()}
        others = [f"{name}={value!r}" for name, value in self.settings.items() if value != {**plain, **named}[name]]
        return f"Config.of({', '.join([repr(self.method), *others])})" if named else f"Config({', '.join(others)})"


SETTINGS: Mapping[str, Setting] = {
    one.name: Setting(one.name, one.default, "None" in str(one.type), **one.metadata)
    for one in fields(Config)
    if one.metadata
}
_listed = "\n".join(f"        {setting.name}: {setting.description}" for setting in SETTINGS.values())
Config.__doc__ = (Config.__doc__ or "").replace("    Raises:", f"    Attributes:\n{_listed}\n\n    Raises:")


def schema() -> dict[str, Any]:
    """JSON schema of the settings, every one of which may be left out."""
    properties = {}
    for name, setting in SETTINGS.items():
        kind = {"anyOf": [setting.kind.schema, {"type": "null"}]} if setting.optional else setting.kind.schema
        properties[name] = {**kind, "default": setting.default, "description": setting.description}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _refusal(setting: Setting, needs: Needs, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Why a setting means nothing without what it needs, and the way out; nothing where it is not given."""
    value, other = values[setting.name], values[needs.other]
    if value != setting.default:
        beside = f"without `{needs.other}`" if other is None else f"with `{needs.other}` {other!r}"
        rule = f"`{setting.name}` is {setting.shown(value)} {beside}, but means something only with {needs.told}"
        yield rule, f"{needs.way_out}, or leave `{setting.name}` out"


def check_attention(config: Config) -> None:
    """Raise a ConfigError if a setting is given that needs a carry which goes by attention; for one that does not."""
    for setting in SETTINGS.values():
        if setting.needs is ATTENTION:
            for rule, way_out in _refusal(setting, ATTENTION, config.settings):
                raise ConfigError(rule, way_out)


def check_source(settings: Mapping[str, Any], source: str) -> None:
    """Raise a ConfigError if one of these settings, given for this source, means nothing with it, or is none.

    Args:
        settings: by name; what is at its default passes.
        source: of `SOURCES`.
    """
    for name, value in settings.items():
        check_name("setting", name, tuple(SETTINGS))
        setting = SETTINGS[name]
        if value == setting.default or source in setting.sources:
            continue
        told = " or ".join(SOURCES[known] for known in setting.sources)
        rule = f"`{name}` is {setting.shown(value)} with {SOURCES[source]}, but means something only with {told}"
        raise ConfigError(rule, f"leave `{name}` out")


def _without_idle(values: Mapping[str, Any], but: Container[str] = ()) -> dict[str, Any]:
    """Settings that mean nothing beside the others at their defaults, `but` those."""
    found = dict(values)
    for name, setting in SETTINGS.items():  # each stands behind what it needs
        if name not in but and not _means(setting, found):
            found[name] = setting.default
    return found


def _means(setting: Setting, values: Mapping[str, Any]) -> bool:
    return setting.needs is None or setting.needs.met(values)


def _name_of(values: Mapping[str, Any], made_with: str) -> str:
    """The method's name: that which it was made with if it is still true, else the one that asks for the most."""

    def fits(method: str) -> bool:
        own = METHODS.get(method)
        return own is not None and all(
            values[name] == value for name, value in own.items() if SETTINGS[name].kind.option is not int
        )

    if fits(made_with):
        return made_with
    found = [method for method in METHODS if fits(method)]
    carry = values["carry"] if isinstance(values["carry"], str) else spell(values["carry"], CARRIES)
    return max(found, key=lambda method: len(METHODS[method]), default=f"{carry}+{values['recall']}")


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
