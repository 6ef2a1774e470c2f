"""A stream's memory as facts and tensors, and back."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch

from statekv.cache.blocks import Block
from statekv.cache.carried import CarriedCache
from statekv.cache.compaction import Compaction
from statekv.cache.folder import Saved, read_folder, write_folder
from statekv.cache.geometry import Geometry
from statekv.cache.stream import Span, StreamState
from statekv.config import Config
from statekv.errors import ModelError, SaveError

Parts = Iterable[tuple[str, dict[str, torch.Tensor]]]

_PLAIN = ("horizon", "frames_expected", "room", "position", "frames", "origin_seconds", "compacts")


def save_stream(
    state: StreamState, folder: str | os.PathLike[str], beside: Mapping[str, Any] | None = None, parts: Parts = ()
) -> None:
    """Write a stream to a folder, whose former save is replaced once this one is whole.

    Args:
        state: the stream; it is left as it is.
        folder: made where there is none.
        beside: facts that are saved with it, under names of their own.
        parts: tensors that are saved with it.

    Raises:
        SaveError: the folder cannot be written, or holds something else; a former save in it is intact.
    """
    write_folder(folder, {"stream": _facts(state), **(beside or {})}, chain(_layers(state), parts))


def load_stream(source: Saved | str | os.PathLike[str], geometry: Geometry) -> StreamState:
    """Read a stream for a model whose keys have this geometry.

    Raises:
        SaveError: the folder holds no saved stream, a damaged one, or one of another version.
        ModelError: the stream belongs to a model with other keys.
    """
    saved = source if isinstance(source, Saved) else read_folder(source)
    with saved.reading():
        facts = saved.facts["stream"]
        _check_geometry(saved, facts["geometry"], _geometry(geometry))
        config = _config(saved, facts["config"])
        state = StreamState(geometry, config, **{name: facts[name] for name in _PLAIN})
        state.compaction = Compaction(**facts["compaction"])
        state.spans = [Span(**span) for span in facts["spans"]]
        _restore(state, saved, facts)
    return state


def _layers(state: StreamState) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    for layer in range(state.geometry.layers):
        detailed = state.detailed.buffers[layer][..., : state.detailed.lengths[layer], :]
        found = {"detailed": detailed.contiguous()}
        if isinstance(state.carried, CarriedCache):
            length = state.carried.lengths[layer]
            found["carried"] = state.carried.buffers[layer][..., :length, :].contiguous()
            found["born"] = state.carried.born[layer][..., :length].contiguous()
            if state.carried.totals:
                found["totals"] = state.carried.totals[layer][..., :length].contiguous()
        if state.blocks is not None:
            found["blocks"] = state.blocks.means[layer][:, :, : len(state.blocks)].contiguous()
        yield _layer_name(layer), found


def _layer_name(layer: int) -> str:
    return f"layer-{layer:02d}"


def _facts(state: StreamState) -> dict[str, Any]:
    return {
        "geometry": _geometry(state.geometry),
        "config": dataclasses.asdict(state.config),
        "pinned": state.pinned,
        "compaction": dataclasses.asdict(state.compaction),
        "carried": list(state.carried.lengths),
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


def _check_geometry(saved: Saved, found: dict[str, Any], expected: dict[str, Any]) -> None:
    if found == expected:
        return
    if found == {**expected, "dtype": found["dtype"]}:
        rule = f"{saved.folder} holds keys of {found['dtype']}, the model's are {expected['dtype']}"
        raise ModelError(rule, f"load it with dtype {found['dtype']}")
    raise ModelError(
        f"{saved.folder} holds keys of {found}, the model's are {expected}", "load the model that it names"
    )


def _config(saved: Saved, settings: dict[str, Any]) -> Config:
    unknown = settings.keys() - {field.name for field in dataclasses.fields(Config)}
    if unknown:
        rule = f"{saved.folder} was saved with the setting {min(unknown)!r}, which this version does not know"
        raise SaveError(rule, "restore it with the version that saved it")
    return Config(**settings)


@torch.inference_mode()
def _restore(state: StreamState, saved: Saved, facts: dict[str, Any]) -> None:
    if facts["pinned"]:
        state.expect_prefix(facts["pinned"])
    carried, means = state.carried, []
    if isinstance(carried, CarriedCache):
        carried.allocate(facts["carried"])
        carried.lengths = list(facts["carried"])
    for layer in range(state.geometry.layers):
        tensors = saved.part(_layer_name(layer))
        key, value = tensors["detailed"]
        state.detailed.append(key, value, layer)
        if isinstance(carried, CarriedCache):
            carried.buffers[layer][:] = tensors["carried"]
            carried.born[layer][:] = tensors["born"]
            if carried.totals:
                carried.totals[layer][:] = tensors["totals"]
        if state.blocks is not None:
            means.append(tensors["blocks"])
    if state.blocks is not None:
        state.blocks.restore([Block(**block) for block in facts["blocks"]], means)
