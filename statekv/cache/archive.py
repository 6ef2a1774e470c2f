"""A stream's memory on disk: tensors as safetensors, the rest as JSON; never pickle."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from statekv.cache.blocks import Block
from statekv.cache.carried import CarriedCache
from statekv.cache.geometry import Geometry
from statekv.cache.stream import Span, StreamState
from statekv.config import Config
from statekv.errors import ModelError, StateKVError

_FORMAT = 1
_PLAIN = ("horizon", "frames_expected", "room", "position", "frames", "origin_seconds")


def save_stream(state: StreamState, folder: str | os.PathLike[str]) -> None:
    """Write a stream to a new folder, which appears once it is whole.

    Raises:
        StateKVError: the folder exists already.
    """
    target = Path(folder)
    if target.exists():
        raise StateKVError(f"{target} exists already", "choose another name, or remove it first")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        partial.mkdir()
        save_file(_tensors(state), partial / "stream.safetensors")
        (partial / "stream.json").write_text(json.dumps(_facts(state), indent=1), encoding="utf-8")
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def load_stream(folder: str | os.PathLike[str], geometry: Geometry) -> StreamState:
    """Read a stream for a model whose keys have this geometry.

    Raises:
        StateKVError: the folder holds no saved stream, or one of another version.
        ModelError: the stream belongs to a model with other keys.
    """
    source = Path(folder)
    try:
        facts = json.loads((source / "stream.json").read_text(encoding="utf-8"))
        if facts["format"] != _FORMAT:
            raise StateKVError(f"{source} has format {facts['format']}, this version reads {_FORMAT}", "save it anew")
        expected = _geometry(geometry)
        if facts["geometry"] != expected:
            rule = f"{source} holds keys of {facts['geometry']}, the model's are {expected}"
            raise ModelError(rule, "load that model")
        state = StreamState(geometry, Config(**facts["config"]), **{name: facts[name] for name in _PLAIN})
        state.spans = [Span(**span) for span in facts["spans"]]
        tensors = load_file(source / "stream.safetensors")
        _restore(state, tensors, facts["pinned"])
        if state.blocks is not None:
            means = [tensors[f"blocks.{layer}"] for layer in range(geometry.layers)]
            state.blocks.restore([Block(**block) for block in facts["blocks"]], means)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError):
        raise StateKVError(
            f"{source} holds no saved stream, or a damaged one", "name a folder that save_stream wrote"
        ) from None
    return state


def _tensors(state: StreamState) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for layer in range(state.geometry.layers):
        found[f"detailed.{layer}"] = state.detailed.buffers[layer][..., : state.detailed.lengths[layer], :].contiguous()
        if isinstance(state.carried, CarriedCache):
            length = state.carried.lengths[layer]
            found[f"carried.{layer}"] = state.carried.buffers[layer][..., :length, :].contiguous()
            found[f"born.{layer}"] = state.carried.born[layer][..., :length].contiguous()
            if state.carried.totals:
                found[f"totals.{layer}"] = state.carried.totals[layer][..., :length].contiguous()
        if state.blocks is not None:
            found[f"blocks.{layer}"] = state.blocks.means[layer][:, :, : len(state.blocks)].contiguous()
    return found


def _facts(state: StreamState) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "geometry": _geometry(state.geometry),
        "config": dataclasses.asdict(state.config),
        "pinned": state.pinned,
        "spans": [dataclasses.asdict(span) for span in state.spans],
        "blocks": [dataclasses.asdict(block) for block in state.blocks.spots] if state.blocks is not None else [],
        **{name: getattr(state, name) for name in _PLAIN},
    }


def _geometry(geometry: Geometry) -> dict[str, Any]:
    return {
        "layers": geometry.layers,
        "kv_heads": geometry.kv_heads,
        "head_dim": geometry.head_dim,
        "streams": geometry.streams,
        "dtype": str(geometry.dtype).removeprefix("torch."),
    }


@torch.inference_mode()
def _restore(state: StreamState, tensors: dict[str, torch.Tensor], pinned: int) -> None:
    if pinned:
        state.expect_prefix(pinned)
    for layer in range(state.geometry.layers):
        key, value = tensors[f"detailed.{layer}"]
        state.detailed.append(key, value, layer)
    carried = state.carried
    if not isinstance(carried, CarriedCache):
        return
    carried.allocate([tensors[f"born.{layer}"].shape[-1] for layer in range(state.geometry.layers)])
    carried.lengths = carried.slots
    for layer in range(state.geometry.layers):
        carried.buffers[layer][:] = tensors[f"carried.{layer}"]
        carried.born[layer][:] = tensors[f"born.{layer}"]
        if carried.totals:
            carried.totals[layer][:] = tensors[f"totals.{layer}"]
