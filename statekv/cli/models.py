"""`statekv models`: what is supported, what it costs, and what has been tried of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.table import Table

from statekv.cli.console import out, to_json

_FRAMES_PER_HOUR = 3600  # at one a second


def models(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object for each model instead.")] = False,
) -> None:
    """List the supported model families, their sizes and what has been tried of them."""
    if as_json:
        typer.echo("\n".join(to_json(row) for row in _rows()))
    else:
        _show()


def _rows() -> Iterator[dict[str, Any]]:
    from statekv.models import FAMILIES

    for name, family in FAMILIES.items():
        for known in family.checkpoints:
            yield {
                "model": known.name,
                "family": name,
                "parameters": round(known.billions * 1e9),
                "tokens_per_frame": family.tokens_per_frame,
                "of_pixels": family.of_pixels,
                "bytes_per_token": known.bytes_per_token,
                "own_code": family.own_code,
                "revision": known.revision,
                "tested": family.tested,
            }


def _show() -> None:
    from statekv.models import FAMILIES, Checkpoint
    from statekv.ops import implementation

    table = Table("model", "params", "KiB a token", "GiB an hour", box=None, pad_edge=False)

    def add(checkpoint: Checkpoint, tokens: float) -> None:
        per_hour = _FRAMES_PER_HOUR * tokens * checkpoint.bytes_per_token / 2**30
        held = f"{checkpoint.bytes_per_token / 2**10:.4g}", f"{per_hour:.{2 if per_hour < 100 else 3}g}"
        table.add_row(f"  {checkpoint.name}", f"{checkpoint.billions} B", *held)

    for name, family in FAMILIES.items():
        star = "*" if family.of_pixels else ""
        table.add_row(f"{name}: {family.tokens_per_frame:g}{star} tokens a frame")
        for checkpoint in family.checkpoints:
            add(checkpoint, family.tokens_per_frame)
    table.add_row("demo: 4 tokens a frame, an internvl")
    add(Checkpoint("demo", 0.0027, 5, 2, 32), 4)
    out().print(table)
    sizes = sorted({"{} x {}".format(*family.of_pixels) for family in FAMILIES.values() if family.of_pixels})
    out().print(
        f"\n* In a video of {', '.join(sizes)} pixels. Qwen3-VL also sizes frames by their number; here a stream's."
        "\nTokens without the words around a frame; detailed cache in half precision, at 1 frame/s."
        f"\nAny checkpoint of these families loads. Attention with key scores: {implementation()}."
    )
    out().print("\nTested token for token against", *_tested(), "demo: its own weights", sep="\n  ")
    out().print("The public sizes: as module trees without weights. No public weights have been run.")
    out().print(*_own_code(), sep="\n", soft_wrap=True)


def _tested() -> Iterator[str]:
    from statekv.models import FAMILIES

    for what in dict.fromkeys(family.tested for family in FAMILIES.values()):
        yield f"{what}: {', '.join(name for name, family in FAMILIES.items() if family.tested == what)}"


def _own_code() -> Iterator[str]:
    """Checkpoints whose code is run, and at which commit."""
    from statekv.models import FAMILIES

    for checkpoint in (known for family in FAMILIES.values() if family.own_code for known in family.checkpoints):
        pinned = checkpoint.revision or "none is known here, so --revision has to name one"
        yield f"{checkpoint.name} runs code of its own, with --trust-remote-code alone. Commit: {pinned}."
