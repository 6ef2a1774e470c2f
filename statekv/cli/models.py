"""`statekv models`: what is supported, and what it costs."""

from __future__ import annotations

from rich.table import Table

from statekv.cli.console import out

_FRAMES_PER_HOUR = 3600  # at one a second


def models() -> None:
    """List the supported model families, their sizes and what has been tried of them."""
    from statekv.models import FAMILIES, Checkpoint
    from statekv.ops import implementation

    table = Table("model", "params", "KiB a token", "GiB an hour", box=None, pad_edge=False)

    def add(checkpoint: Checkpoint, tokens: float) -> None:
        per_hour = _FRAMES_PER_HOUR * tokens * checkpoint.bytes_per_token
        held = f"{checkpoint.bytes_per_token / 2**10:.4g}", f"{per_hour / 2**30:.2g}"
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
        "\nTested: demo with its own weights, the families' architectures with tiny random ones. No other weights."
        f"\nAny checkpoint of these families loads. Attention with key scores: {implementation()}."
    )
