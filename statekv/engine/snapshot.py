"""What a session is besides its stream, on disk and back."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any

import torch

from statekv.cache.archive import load_stream, save_stream
from statekv.cache.folder import Piece, Saved, fits
from statekv.cache.stream import StreamState
from statekv.config import SETTINGS, Config
from statekv.engine.choice import with_gate
from statekv.engine.progress import Seconds
from statekv.errors import ConfigError, ModelError
from statekv.models.adapter import VideoModel
from statekv.models.encoded import EncodedStep
from statekv.models.loading import Identity, identify
from statekv.runner.runner import with_methods
from statekv.video.frame import Frame

_MADE_WITH = ("statekv", "torch", "transformers")
_FRAMES = "frames"
_FORM = {
    "seconds": {each.name: (int, float) for each in dataclasses.fields(Seconds)},
    "steps": (int,),
    "passed": (int,),
    "broken": (str,),
}


@dataclass
class SessionSnapshot:
    """Where a session stands, its stream left out.

    Attributes:
        seconds: where the time went.
        steps: that have entered.
        waiting: frames that wait for a partner, or for a question.
        passed: frames that only the newest ones kept out of every answer.
        broken: why nothing can enter any more; "" while it can.
        ahead: frames read before their turn.
        looked: what the vision tower made of some steps before theirs.
    """

    seconds: Seconds = field(default_factory=Seconds)
    steps: int = 0
    waiting: Sequence[Frame] = ()
    passed: int = 0
    broken: str = ""
    ahead: Sequence[Frame] = ()
    looked: Sequence[EncodedStep] = ()


def save_session(
    folder: str | os.PathLike[str],
    model: VideoModel,
    state: StreamState,
    snapshot: SessionSnapshot,
    source: dict[str, Any] | None,
) -> None:
    """Write a session.

    Args:
        folder: made where there is none; a session that it holds is replaced once this one is whole.
        model: what the stream was computed with.
        state, snapshot: the session.
        source: how to go on reading; None: frames are pushed.

    Raises:
        SaveError: the folder cannot be written, or holds something else; a former save in it is intact.
    """
    frames = list({id(frame): frame for frame in _all_frames(snapshot)}.values())
    numbers = {id(frame): number for number, frame in enumerate(frames)}
    beside = {
        "model": dataclasses.asdict(identify(model)),
        "frequencies": _frequencies(model, state),
        "made_with": {name: version(name) for name in _MADE_WITH},
        "source": source,
        "session": {
            "seconds": dataclasses.asdict(snapshot.seconds),
            "steps": snapshot.steps,
            "passed": snapshot.passed,
            "broken": snapshot.broken,
            "frames": [_told(frame) for frame in frames],
            "waiting": [numbers[id(frame)] for frame in snapshot.waiting],
            "ahead": [numbers[id(frame)] for frame in snapshot.ahead],
            "looked": [
                {
                    "frames": [numbers[id(frame)] for frame in seen.frames],
                    "tokens": seen.grid,
                    "deepstack": len(seen.deepstack),
                }
                for seen in snapshot.looked
            ],
        },
    }
    save_stream(state, folder, beside, [Piece(_FRAMES, partial(_frame_tensors, frames, snapshot.looked))])


def load_session(saved: Saved, model: VideoModel, settings: Mapping[str, Any]) -> tuple[StreamState, SessionSnapshot]:
    """Read a session.

    Args:
        saved: its folder.
        model: what it goes on with.
        settings: fields of `Config` to have anew.

    Raises:
        SaveError: the folder is damaged.
        ModelError: the session belongs to another model, or to the same one in another dtype.
        ConfigError: a setting that the stream was made with and that cannot change any more.
    """
    with saved.reading():
        _check_model(saved, Identity(**saved.facts["model"]), identify(model))
        state = load_stream(saved, model.kv_spec(), partial(_changed, saved, settings=settings), model)
        _check_frequencies(saved, _frequencies(model, state))
        return state, _standing(saved, model.model.device)


def _all_frames(snapshot: SessionSnapshot) -> Iterator[Frame]:
    yield from snapshot.waiting
    yield from snapshot.ahead
    for seen in snapshot.looked:
        yield from seen.frames


def _told(frame: Frame) -> dict[str, Any]:
    """All of a frame but its pixels."""
    names = (field.name for field in dataclasses.fields(frame))
    return {name: getattr(frame, name) for name in names if name != "data"}


def _frame_tensors(frames: Sequence[Frame], looked: Sequence[EncodedStep]) -> dict[str, torch.Tensor]:
    # Cloned: features of one batch lie in one piece of memory, which safetensors refuses.
    found = {f"frame.{number}": frame.data.cpu().clone() for number, frame in enumerate(frames)}
    for number, seen in enumerate(looked):
        found[f"features.{number}"] = seen.features.cpu().clone()
        for level, features in enumerate(seen.deepstack):
            found[f"deepstack.{number}.{level}"] = features.cpu().clone()
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _standing(saved: Saved, device: torch.device) -> SessionSnapshot:
    facts, tensors = saved.facts["session"], saved.part(_FRAMES)
    if not fits(facts, _FORM):
        raise TypeError("facts of other kinds")
    frames = [Frame(tensors[f"frame.{number}"], **told) for number, told in enumerate(facts["frames"])]
    looked = []
    for number, seen in enumerate(facts["looked"]):
        deepstack = tuple(tensors[f"deepstack.{number}.{level}"].to(device) for level in range(seen["deepstack"]))
        pictures = tuple(frames[index] for index in seen["frames"])
        features, grid = tensors[f"features.{number}"].to(device), (seen["tokens"][0], seen["tokens"][1])
        looked.append(EncodedStep(pictures, features, grid, deepstack))
    return SessionSnapshot(
        seconds=Seconds(**facts["seconds"]),
        steps=facts["steps"],
        waiting=[frames[index] for index in facts["waiting"]],
        passed=facts["passed"],
        broken=facts["broken"],
        ahead=[frames[index] for index in facts["ahead"]],
        looked=looked,
    )


def _check_model(saved: Saved, then: Identity, now: Identity) -> None:
    told = f"{saved.folder} was saved with {then.name or then.kind}"
    hint = "load the model that it was saved with"
    if then.kind != now.kind:
        raise ModelError(f"{told}, a model of the family {then.kind}; this is {now.name or now.kind}", hint)
    if then.dtype != now.dtype:
        raise ModelError(f"{told} in {then.dtype}, this one is {now.dtype}", f"load it with `dtype` {then.dtype}")
    if then.weights != now.weights:
        raise ModelError(f"{told}; the weights of {now.name or now.kind} are others", hint)
    if then.texts != now.texts:
        raise ModelError(f"{told}; the chat template or the video processor of this one is another", hint)


def _frequencies(model: VideoModel, state: StreamState) -> list[float]:
    found: list[float] = model.rope.frequencies(state.horizon).float().cpu().tolist()
    return found


def _check_frequencies(saved: Saved, now: list[float]) -> None:
    then = saved.facts["frequencies"]
    # Devices may round differently.
    if len(then) != len(now) or not torch.allclose(torch.tensor(then), torch.tensor(now), rtol=1e-5, atol=0):
        rule = f"{saved.folder} was saved with other rotary frequencies than this model has"
        raise ModelError(rule, "load the model with the configuration that it had")


def _changed(saved: Saved, config: Config, settings: Mapping[str, Any]) -> Config:
    new = config.with_(None, **settings)
    for name, what in (("carry", "policy"), ("reduce", "reducer"), ("gate", "gate")):
        if name not in settings:
            _check_imported(saved, name, getattr(config, name))
        try:
            new = with_gate(new) if name == "gate" else with_methods(new, [name])
        except ConfigError as error:
            if name in settings:
                raise
            hint = f"make it importable as it was then, or give one with the same name and parameters: {name}=…"
            raise ConfigError(f"{saved.folder} was watched with a {what}: {error.message}", hint) from None
    facts, facts_then = new.facts, config.facts
    for name in settings:
        then, now = facts_then[name], facts[name]
        if then != now and not SETTINGS[name].may_change(capped=config.memory is not None):
            rule = f"{saved.folder} was watched with `{name}` {then!r}, not {now!r}"
            raise ConfigError(rule, f"leave `{name}` out, or watch the video again")
    return new


def _check_imported(saved: Saved, name: str, spelled: str | None) -> None:
    """What is imported is not for a folder to say, which may come from a stranger with code beside it."""
    module, _, place = (spelled or "").partition(":")
    if place and module not in sys.modules and not module.startswith("statekv."):
        rule = f"{saved.folder} was watched with `{name}` {spelled!r}, but a saved session imports nothing by itself"
        raise ConfigError(rule, f"import {module}, or give `{name}` as it was then")
