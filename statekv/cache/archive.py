"""A stream's memory as facts and tensors, and back."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch

from statekv.cache.carried import CarriedCache
from statekv.cache.compaction import Compaction
from statekv.cache.folder import Piece, Saved, fits, read_folder, write_folder
from statekv.cache.retrieval import StepIndexEntry
from statekv.cache.spec import KVSpec, Span
from statekv.cache.stream import StreamState
from statekv.cache.tiers.base import Content
from statekv.cache.tiers.block import OffloadedBlock, SegmentEntry
from statekv.cache.tiers.cache import TieredCache
from statekv.cache.tiers.plan import MemoryPlan
from statekv.cache.tiers.window import WindowedCache
from statekv.cache.view import Rotary
from statekv.config import SETTINGS, Config
from statekv.errors import ModelError, SaveError, StorageError, StorageWarning

_STEPS = "steps"
_MEMORIES = "memories"
_STATE = "state."  # in front of the name of what a policy remembers
_WHOLE, _NUMBER, _MAYBE = (int,), (int, float), (int, type(None))
_PLAIN: dict[str, tuple[type, ...]] = {
    "horizon": _WHOLE,
    "frames_expected": _MAYBE,
    "room": _WHOLE,
    "position": _WHOLE,
    "frames": _WHOLE,
    "origin_seconds": (*_NUMBER, type(None)),
    "compacts": (bool,),
}
# What is used long after it has been read.
_FORM: dict[str, Any] = {
    **_PLAIN,
    "pinned": _MAYBE,
    "compaction": {each.name: _WHOLE for each in dataclasses.fields(Compaction)},
    "carried": [_WHOLE],
    "parts": [[_WHOLE]],
    "kinds": [(str,)],
    "words": [_WHOLE],
    "pairs": [_WHOLE],
    "window": dict.fromkeys(("away", "longest", "room"), _WHOLE),
    "tiers": {
        "plan": {each.name: _MAYBE if each.name == "most_steps" else _WHOLE for each in dataclasses.fields(MemoryPlan)},
        **dict.fromkeys(("longest", "id_bytes", "forgotten", "away"), _WHOLE),
    },
}


def save_stream(
    state: StreamState,
    folder: str | os.PathLike[str],
    beside: Mapping[str, Any] | None = None,
    pieces: Iterable[Piece] = (),
) -> None:
    """Write a stream to a folder, made where there is none, with facts (`beside`) and tensors (`pieces`) of the
    caller's; a former save there is replaced once this one is whole.

    Of the detailed cache only the parts are written that the former save does not have as they are now.

    Args:
        state: the stream; it is left as it is, but for steps on disk that turn out to be damaged: they are forgotten,
            with a warning, so that the rest can be saved.

    Raises:
        SaveError: the folder cannot be written, or holds something else; a former save in it is intact.
    """
    pieces = list(pieces)
    while True:
        try:
            digests = write_folder(folder, {"stream": _facts(state), **(beside or {})}, chain(_pieces(state), pieces))
            break
        except StorageError as error:
            warnings.warn(StorageWarning(error.message), stacklevel=2)
            state.settle()
    spots = ((part.first, part.stop) for part in state.detailed.parts())
    state.detailed.written.note({spot: digests[_part_name(spot[0])] for spot in spots})
    if isinstance(state.detailed, TieredCache):
        note_blocks(state.detailed, digests)


def load_stream(
    source: Saved | str | os.PathLike[str],
    spec: KVSpec,
    change: Callable[[Config], Config] | None = None,
    rotary: Rotary | None = None,
) -> StreamState:
    """Read a stream for a model whose keys have this geometry.

    Args:
        change: makes the configuration to go on with of the saved one; None: that stays.
        rotary: of the model; None: nothing will be turned, asked or indexed.

    Raises:
        SaveError: the folder holds no saved stream, a damaged one, or one of another version.
        ModelError: the stream belongs to a model with other keys.
    """
    saved = source if isinstance(source, Saved) else read_folder(source)
    with saved.reading():
        facts = saved.facts["stream"]
        if not fits(facts, _FORM):
            raise TypeError("facts of other kinds")
        _check_geometry(saved, facts["geometry"], _geometry(spec))
        config = _config(saved, facts["config"])
        config = config if change is None else change(config)
        state = StreamState(spec, config, **{name: facts[name] for name in _PLAIN}, rotary=rotary)
        state.compaction = Compaction(**facts["compaction"])
        _restore(state, saved, facts)
    return state


def _pieces(state: StreamState) -> Iterator[Piece]:
    for part in state.detailed.parts():
        digest = state.detailed.written.digest(part.first, part.stop)
        yield Piece(_part_name(part.first), part.tensors, digest)
    if isinstance(state.detailed, TieredCache):
        yield from block_pieces(state.detailed)
    if state.bounded is not None:
        for layer in range(state.spec.layers):
            yield Piece(_layer_name(layer), partial(_carried, state.bounded, layer))
    yield Piece(_STEPS, partial(_steps, state))
    if state.memories:
        yield Piece(_MEMORIES, partial(_memory_tensors, state))


def _carried(carried: CarriedCache, layer: int) -> dict[str, torch.Tensor]:
    length = carried.lengths[layer]
    found = {
        "carried": carried.buffers[layer][..., :length, :].contiguous(),
        "token_ids": carried.token_ids[layer][..., :length].contiguous(),
    }
    for name, tensor in carried.state[layer].items():
        found[f"{_STATE}{name}"] = tensor[..., :length].contiguous()
    return found


def _steps(state: StreamState) -> dict[str, torch.Tensor]:
    """Spans and representatives, as tensors: there is one for each step, and JSON would take several times as long."""
    kinds = _kinds(state)
    rows = [(kinds.index(span.kind), span.start, span.length, span.position) for span in state.spans]
    seconds = [math.nan if span.pts_seconds is None else span.pts_seconds for span in state.spans]
    found = {
        "spans": torch.tensor(rows, dtype=torch.int64).view(-1, 4),
        "seconds": torch.tensor(seconds, dtype=torch.float64),
    }
    if state.blocks is not None:
        found["blocks"] = state.blocks.table.contiguous()
        found["texts"] = torch.tensor(state.blocks.texts, dtype=torch.int64).view(-1, 2)
        for layer, means in enumerate(state.blocks.means):
            found[_layer_name(layer)] = means[:, :, : len(state.blocks)].contiguous()
    return found


def _memory_tensors(state: StreamState) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value.cpu().contiguous().clone()
        for name, memory in state.memories.items()
        for key, value in memory.items()
        if isinstance(value, torch.Tensor)
    }


def _memory_facts(state: StreamState) -> dict[str, Any]:
    """Of a tensor, whether it lies on the host."""
    return {
        name: {
            "tensors": {key: value.is_cpu for key, value in memory.items() if isinstance(value, torch.Tensor)},
            "facts": {key: value for key, value in memory.items() if not isinstance(value, torch.Tensor)},
        }
        for name, memory in state.memories.items()
    }


def _restore_memories(state: StreamState, saved: Saved, known: dict[str, Any]) -> None:
    tensors, device = saved.part(_MEMORIES) if known else {}, state.spec.devices[0]
    state.memories = {
        name: memory["facts"]
        | {key: tensors[f"{name}.{key}"].to("cpu" if on_host else device) for key, on_host in memory["tensors"].items()}
        for name, memory in known.items()
    }


def _kinds(state: StreamState) -> list[str]:
    return sorted({span.kind for span in state.spans})


def _part_name(first: int) -> str:
    return f"tokens-{first:09d}"


def _layer_name(layer: int) -> str:
    return f"layer-{layer:02d}"


def _facts(state: StreamState) -> dict[str, Any]:
    return {
        "geometry": _geometry(state.spec),
        "config": state.config.facts,
        "pinned": state.pinned,
        "compaction": dataclasses.asdict(state.compaction),
        "carried": list(state.carried.lengths),
        "parts": [(part.first, part.stop) for part in state.detailed.parts()],
        "kinds": _kinds(state),
        "outlived": sorted(state.outlived),
        "words": sorted(state.words),
        "pairs": state.pairs,
        "memories": _memory_facts(state),
        "window": {name: getattr(state.detailed, name) for name in ("away", "longest", "room")}
        if isinstance(state.detailed, WindowedCache)
        else None,
        "tiers": tier_facts(state.detailed) if isinstance(state.detailed, TieredCache) else None,
        **{name: getattr(state, name) for name in _PLAIN},
    }


def _geometry(spec: KVSpec) -> dict[str, Any]:
    return {
        "layers": spec.layers,
        "kv_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "streams": spec.streams,
        "dtype": str(spec.dtype).removeprefix("torch."),
    }


def _check_geometry(saved: Saved, found: dict[str, Any], expected: dict[str, Any]) -> None:
    if found == expected:
        return
    if found == {**expected, "dtype": found["dtype"]}:
        rule = f"{saved.folder} holds keys of {found['dtype']}, the model's are {expected['dtype']}"
        raise ModelError(rule, f"load it with `dtype` {found['dtype']}")
    raise ModelError(
        f"{saved.folder} holds keys of {found}, the model's are {expected}", "load the model that it names"
    )


def _config(saved: Saved, settings: dict[str, Any]) -> Config:
    unknown = settings.keys() - SETTINGS.keys() - {"method"}
    if unknown:
        rule = f"{saved.folder} was saved with the setting {min(unknown)!r}, which this version does not know"
        raise SaveError(rule, "restore it with the version that saved it")
    return Config.of_facts(settings)


@torch.inference_mode()
def _restore(state: StreamState, saved: Saved, facts: dict[str, Any]) -> None:
    if facts["pinned"]:
        state.expect_prefix(facts["pinned"])
    _restore_detailed(state, saved, facts)
    # Older saves of format 4 know neither words nor pairs.
    state.outlived, state.words = set(facts["outlived"]), frozenset(facts.get("words", ()))
    state.pairs = tuple(facts.get("pairs", (0, 0)))
    carried = state.bounded
    if carried is not None:
        carried.allocate(facts["carried"])
        carried.lengths = list(facts["carried"])
        for layer in range(state.spec.layers):
            tensors = saved.part(_layer_name(layer))
            carried.buffers[layer][:] = tensors["carried"]
            carried.token_ids[layer][:] = tensors["token_ids"]
            for name, tensor in carried.state[layer].items():
                tensor[:] = tensors[f"{_STATE}{name}"]
    _restore_steps(state, saved.part(_STEPS), facts["kinds"])
    _restore_memories(state, saved, facts.get("memories", {}))  # 0.1 knew of none


def _restore_detailed(state: StreamState, saved: Saved, facts: dict[str, Any]) -> None:
    cache, parts, tiers = state.detailed, facts["parts"], facts["tiers"]
    if isinstance(cache, TieredCache):
        restore_blocks(cache, saved, tiers)
        if state.blocks is not None:
            state.blocks.most = cache.most_steps
    cache.reserve(parts[-1][1] if parts else 0)
    written = {}
    for first, stop in parts:
        name = _part_name(first)
        cache.restore(saved.part(name))
        written[first, stop] = saved.files[name]["sha256"]
    cache.written.note(written)
    if isinstance(cache, TieredCache):
        cache.settled(tiers["away"])
    if isinstance(cache, WindowedCache) and (window := facts.get("window")):  # format 4 held all tokens
        cache.resume(**window)


def _restore_steps(state: StreamState, tensors: dict[str, torch.Tensor], kinds: list[str]) -> None:
    rows = zip(tensors["spans"].tolist(), tensors["seconds"].tolist(), strict=True)
    state.spans = [
        Span(kinds[kind], start, length, None if math.isnan(seconds) else seconds, position)
        for (kind, start, length, position), seconds in rows
    ]
    if state.blocks is not None:
        spots = [StepIndexEntry(*spot) for spot in tensors["blocks"].tolist()]
        texts = [(start, stop) for start, stop in tensors["texts"].tolist()]
        state.blocks.restore(spots, [tensors[_layer_name(layer)] for layer in range(state.spec.layers)], texts)


_PASSAGES = "passages"


def block_pieces(cache: TieredCache) -> Iterator[Piece]:
    """A piece for each block, and one that says where all segments lie."""
    for _, block, steps in cache.manager.blocks():
        yield Piece(_name(steps), partial(_tensors, cache, block, steps), cache.saved_blocks.get(block))
    yield Piece(_PASSAGES, partial(_passages, cache))


def note_blocks(cache: TieredCache, digests: dict[str, str]) -> None:
    """Know which files hold which blocks, so that the next save need not write them."""
    for _, block, steps in cache.manager.blocks():
        cache.saved_blocks[block] = digests[_name(steps)]


def tier_facts(cache: TieredCache) -> dict[str, Any]:
    """All that is no tensor."""
    return {
        "plan": dataclasses.asdict(cache.plan) if cache.plan is not None else None,
        "longest": cache.longest,
        "id_bytes": cache.id_bytes,
        "forgotten": cache.forgotten,
        "away": cache.away,
        "blocks": [(tier, _name(steps)) for tier, _, steps in cache.manager.blocks()],
    }


def restore_blocks(cache: TieredCache, saved: Saved, facts: dict[str, Any]) -> None:
    """Bring an empty cache to where it was, but for its buffers."""
    plan = MemoryPlan(**facts["plan"]) if facts["plan"] is not None else None
    entries = [
        (SegmentEntry(start, length, kind, place, worth, None, row, moved), block)
        for start, length, place, row, moved, block, worth, kind in _rows(saved.part(_PASSAGES))
    ]
    id_bytes = facts.get("id_bytes", 4)  # 0.1 knew of no others
    cache.resume(plan, facts["longest"], facts["forgotten"], [entry for entry, _ in entries], id_bytes)
    members: dict[int, list[SegmentEntry]] = {}
    for entry, block in entries:
        members.setdefault(block, []).append(entry)
    for number, (tier, name) in enumerate(facts["blocks"]):
        cache.manager.restore(tier, _content(saved.part(name), cache.spec.layers), members[number])
        cache.saved_blocks[members[number][0].offloaded] = saved.files[name]["sha256"]


def _name(steps: Sequence[SegmentEntry]) -> str:
    return f"block-{steps[0].start:09d}"


def _tensors(cache: TieredCache, block: OffloadedBlock, steps: Sequence[SegmentEntry]) -> dict[str, torch.Tensor]:
    try:
        content = block.held.content()
    except StorageError as error:
        raise StorageError(f"{error.message}; damaged steps forgotten: {cache.lose_damaged(steps)}") from None
    return {
        f"{name}.{layer:02d}": tensor.cpu().contiguous()
        for layer, tensors in enumerate(content)
        for name, tensor in tensors.items()
    }


def _content(tensors: dict[str, torch.Tensor], layers: int) -> list[Content]:
    found: list[Content] = [{} for _ in range(layers)]
    for name, tensor in tensors.items():
        kind, layer = name.split(".")
        found[int(layer)][kind] = tensor
    # Files keep names in an order of their own; blocks have one.
    order = ("tokens", "codes", "scale", "zero")
    return [{name: layer[name] for name in order if name in layer} for layer in found]


def _passages(cache: TieredCache) -> dict[str, torch.Tensor]:
    numbers = {block: number for number, (_, block, _) in enumerate(cache.manager.blocks())}
    kinds = "".join("s" if entry.kind == "step" else "t" for entry in cache.entries.values())
    rows = [
        (each.start, each.length, each.place, each.row, each.moved, -1 if each.block is None else numbers[each.block])
        for each in cache.entries.values()
    ]
    return {
        "rows": torch.tensor(rows, dtype=torch.int64).view(-1, 6),
        "worths": torch.tensor([each.worth for each in cache.entries.values()], dtype=torch.float64),
        "kinds": torch.tensor(list(kinds.encode()), dtype=torch.uint8),
    }


def _rows(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[Any, ...]]:
    for row, worth, kind in zip(
        tensors["rows"].tolist(), tensors["worths"].tolist(), tensors["kinds"].tolist(), strict=True
    ):
        yield *row, worth, "step" if kind == ord("s") else "text"
