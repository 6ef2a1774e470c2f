"""The command line: answers go to standard output, everything else to standard error."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import typer
from typer.core import TyperGroup

from statekv.cli import analyze, ask, bench, bench_streams, demo, evals, evals_report, models, watch
from statekv.cli.console import notes, show_warning
from statekv.cli.heap import keep_freed_memory
from statekv.cli.threads import wait_briefly
from statekv.errors import StateKVError


class _Commands(TyperGroup):
    """Says that it was interrupted; typer alone leaves without a word."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            notes.print("statekv: interrupted", markup=False)
            raise typer.Exit(130) from None


app = typer.Typer(
    name="statekv",
    cls=_Commands,
    help="Watch videos with a frozen video language model at a flat cost per frame, and question them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(ask.ask)
app.command()(watch.watch)
app.command()(demo.demo)
app.command()(analyze.analyze)
app.command()(models.models)
for command in (bench_streams.prefill, bench_streams.answer, bench_streams.sessions, bench_streams.video):
    bench.app.command()(command)
app.add_typer(bench.app)
evals.app.command()(evals_report.report)
evals.app.command()(evals_report.picture)
app.add_typer(evals.app)


def main() -> None:
    """Entry point of the `statekv` command."""
    # Loading bars of transformers would end up between an answer and its reader.
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # five retries would be ten lines before ours
    warnings.showwarning = show_warning
    keep_freed_memory()
    wait_briefly()
    try:
        app()
    except StateKVError as error:
        notes.print(f"statekv: {error}", markup=False, soft_wrap=True)
        raise SystemExit(1) from None
