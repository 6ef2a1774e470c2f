"""A capped detailed cache as facts and files, and back: its blocks are written once, under the names of their steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from statekv.cache.folder import Piece, Saved
from statekv.cache.tiers.passage import Passage
from statekv.cache.tiers.plan import MemoryPlan
from statekv.cache.tiers.rows import Content
from statekv.cache.tiers.sealed import Sealed
from statekv.cache.tiers.tiered import TieredCache
from statekv.errors import StorageError

_PASSAGES = "passages"


def block_pieces(cache: TieredCache) -> Iterator[Piece]:
    """A piece for each block, and one that says where all segments lie."""
    for _, block, steps in cache.shelves.blocks():
        yield Piece(_name(steps), partial(_tensors, cache, block, steps), cache.saved_blocks.get(block))
    yield Piece(_PASSAGES, partial(_passages, cache))


def note_blocks(cache: TieredCache, digests: dict[str, str]) -> None:
    """Know which files hold which blocks, so that the next save need not write them."""
    for _, block, steps in cache.shelves.blocks():
        cache.saved_blocks[block] = digests[_name(steps)]


def tier_facts(cache: TieredCache) -> dict[str, Any]:
    """All that is no tensor."""
    return {
        "plan": dataclasses.asdict(cache.plan) if cache.plan is not None else None,
        "longest": cache.longest,
        "forgotten": cache.forgotten,
        "away": cache.away,
        "blocks": [(tier, _name(steps)) for tier, _, steps in cache.shelves.blocks()],
    }


def restore_blocks(cache: TieredCache, saved: Saved, facts: dict[str, Any]) -> None:
    """Bring an empty cache to where it was, but for its buffers."""
    plan = MemoryPlan(**facts["plan"]) if facts["plan"] is not None else None
    passages = [_passage(*row) for row in _rows(saved.part(_PASSAGES))]
    cache.resume(plan, facts["longest"], facts["forgotten"], [passage for passage, _ in passages])
    members: dict[int, list[Passage]] = {}
    for passage, block in passages:
        members.setdefault(block, []).append(passage)
    for number, (tier, name) in enumerate(facts["blocks"]):
        cache.shelves.restore(tier, _content(saved.part(name), cache.geometry.layers), members[number])
        cache.saved_blocks[members[number][0].sealed] = saved.files[name]["sha256"]


def _name(steps: Sequence[Passage]) -> str:
    return f"block-{steps[0].start:09d}"


def _tensors(cache: TieredCache, block: Sealed, steps: Sequence[Passage]) -> dict[str, torch.Tensor]:
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
    numbers = {block: number for number, (_, block, _) in enumerate(cache.shelves.blocks())}
    kinds = "".join("s" if passage.kind == "step" else "t" for passage in cache.passages.values())
    rows = [
        (each.start, each.length, each.place, each.row, each.moved, -1 if each.block is None else numbers[each.block])
        for each in cache.passages.values()
    ]
    return {
        "rows": torch.tensor(rows, dtype=torch.int64).view(-1, 6),
        "worths": torch.tensor([each.worth for each in cache.passages.values()], dtype=torch.float64),
        "kinds": torch.tensor(list(kinds.encode()), dtype=torch.uint8),
    }


def _rows(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[Any, ...]]:
    for row, worth, kind in zip(
        tensors["rows"].tolist(), tensors["worths"].tolist(), tensors["kinds"].tolist(), strict=True
    ):
        yield *row, worth, "step" if kind == ord("s") else "text"


def _passage(
    start: int, length: int, place: int, row: int, moved: int, block: int, worth: float, kind: str
) -> tuple[Passage, int]:
    return Passage(start, length, kind, place, worth, None, row, moved), block
