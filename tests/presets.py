"""Methods and dials that tests go through, told once."""

from __future__ import annotations

from typing import Any

from statekv.config import Config

Settings = dict[str, Any]  # of `Engine.open`

DIALS: dict[str, Settings] = {
    "decay": {"decay": 0.5},
    "sum": {"decay": 1},
    "value_norms": {"value_norms": True},
    "more in the first layers": {"layer_slope": 0.6},
    "more in the last layers": {"layer_slope": -0.3},
    "newest step": {"pin_newest": 1},
    "newest steps": {"pin_newest": 2},
    "coverage": {"coverage": 0.4, "seed": 3},
    "every dial": {"decay": 0.7, "value_norms": True, "layer_slope": 0.2, "pin_newest": 1, "coverage": 0.2},
}
PRESETS: dict[str, Settings] = {
    "attention": {},
    "roomy": {"budget": 100_000},
    "far": {"horizon": 9000},
    "pinned": {"pin_prefix": True, "budget": 40},
    "recent": {"carry": "recent"},
    "random": {"carry": "random", "seed": 5},
    "streaming_llm": {"method": "streaming_llm"},
    "all": {"carry": "all"},
    "rekv": {"method": "rekv", "retrieve": 2, "budget": 60},
    "retrieve": {"method": "statekv_retrieve", "retrieve": 2},
    "last_frames": {"method": "last_frames"},
    "sampled scores": {"score_every": 2},
    "newest and coverage": {"pin_newest": 2, "coverage": 0.25, "budget": 60},
    **DIALS,
}


def filled(settings: Settings, **common: Any) -> Settings:
    """Settings, and of the common ones those that they leave open and that mean something beside them."""
    own = {name: value for name, value in settings.items() if name != "method"}
    fit = Config.of(settings.get("method")).fitting(**{**common, **own})
    return {**{name: value for name, value in common.items() if name in fit}, **settings}


def chosen(*names: str, **common: Any) -> dict[str, Settings]:
    """Presets by name, each with as much of the common settings."""
    return {name: filled(PRESETS[name], **common) for name in names}


def preset(name: str, **own: Any) -> Settings:
    """A preset with other settings, which win."""
    return {**PRESETS[name], **own}
