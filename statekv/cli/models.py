"""`statekv models`: what is supported."""

from __future__ import annotations

from rich.table import Table

from statekv.cli.console import out


def models() -> None:
    """List the supported model families and what has been tried of them."""
    from statekv.models import FAMILIES
    from statekv.ops import implementation

    table = Table("model", "family", "what has been tested", box=None, pad_edge=False)
    table.add_row("demo", "internvl", "everything, with its own weights (shipped with statekv)")
    for name, family in FAMILIES.items():
        for checkpoint in family.checkpoints:
            table.add_row(checkpoint, name, "the architecture, with tiny random weights; not these weights")
    out().print(table)
    out().print(f"\nAny checkpoint of these families loads. Attention with key scores: {implementation()}.")
