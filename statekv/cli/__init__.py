"""The command line: answers go to standard output, everything else to standard error."""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import statekv
from statekv.cli import analyze, ask, bench, demo, evals, models, watch
from statekv.cli.console import complain, guard_standard_streams, show_warning, speak
from statekv.cli.defaults import FILE, offered, read_defaults
from statekv.cli.options import variable
from statekv.engine.interrupts import endings_interrupt
from statekv.errors import ConfigError, StateKVError

_SWITCHES, _WITH_VALUE = ("--quiet", "-q", "--verbose", "-v", "--no-color"), "--config"
_TOLD = "With every command: --quiet, --verbose, --no-color, --config FILE; see statekv -h."


class _Commands(TyperGroup):
    """Takes its own options anywhere on the line, and says that it was interrupted: typer leaves without a word."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own: list[str] = []
        others: list[str] = []
        words = iter(args)
        for word in words:
            if word == "--":
                others += ["--", *words]
            elif word in _SWITCHES or word.startswith(f"{_WITH_VALUE}="):
                own.append(word)
            elif word == _WITH_VALUE:
                own += [word, *([value] if (value := next(words, None)) is not None else [])]
            else:
                others.append(word)
        return super().parse_args(ctx, own + others)

    def invoke(self, ctx: Any) -> Any:
        try:
            with endings_interrupt():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            complain("interrupted")
            raise typer.Exit(130) from None


app = typer.Typer(
    name="statekv",
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _tell_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"statekv {statekv.__version__}")
        raise typer.Exit


@app.callback()
def _statekv(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_tell_version, is_eager=True)
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Answers, warnings and errors alone.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Also what the library logs.")] = False,
    no_color: Annotated[bool, typer.Option("--no-color", help="As with NO_COLOR in the environment.")] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            help=f"Defaults of your own, as in budget = 2048; {FILE} of the current folder if left out.",
            envvar=variable("config"),
        ),
    ] = None,
) -> None:
    """Watch videos with a frozen video language model at a flat cost per frame, and question them."""
    if quiet and verbose:
        raise ConfigError("--quiet and --verbose are both given", "choose one")
    speak(quiet, verbose, no_color)
    context.default_map = offered(context.command, read_defaults(config))


for command in (ask.ask, watch.watch, demo.film, demo.demo, analyze.analyze, models.models):
    app.command(epilog=_TOLD)(command)
for command in (bench.prefill, bench.answer, bench.sessions, bench.video, bench.pretrained):
    bench.app.command(epilog=_TOLD)(command)
app.add_typer(bench.app)
evals.app.command()(evals.report)
evals.app.command()(evals.picture)
app.add_typer(evals.app)


def main() -> None:
    """Entry point of the `statekv` command."""
    try:
        guard_standard_streams()
        _settle()
        try:
            app()
        finally:
            sys.stdout.flush()  # what cannot be written is told here, not by Python at the very end
    except StateKVError as error:
        complain(str(error))
        raise SystemExit(1) from None
    except BrokenPipeError:
        raise SystemExit(1) from None
    except OSError as error:  # a full disk, a file that is gone: not ours to mend
        where = f"{error.filename}: " if error.filename is not None else ""
        complain(f"{where}{(error.strerror or str(error)).lower()}")
        raise SystemExit(1) from None


def _settle() -> None:
    # Loading bars of transformers would end up between an answer and its reader.
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # five retries would be ten lines before ours
    warnings.showwarning = show_warning
    if "" not in sys.path:
        sys.path.append("")  # --carry my_policy:MyPolicy is found in the current folder; last, so that it hides nothing
    keep_freed_memory()
    wait_briefly()


_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # M_… of glibc's malloc.h
_LARGEST_BLOCK = 32 << 20  # bytes; the largest that every glibc accepts
_KEPT = 1 << 30  # bytes
_OWN_HEAP = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Tell glibc to reuse freed blocks of up to 32 MiB in place of giving them back; False where that is not possible.

    A step's activations are a few MiB each. glibc maps each anew, and the system clears every page of it at its first
    touch: 55,000 page faults in one step of a 1B model on a CPU. Up to 1 GiB that a step has needed once stays with the
    process from then on, so the peak does not grow. A choice made in the environment is left alone.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _OWN_HEAP):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_BLOCK)) and bool(mallopt(_TRIM_THRESHOLD, _KEPT))


_SPINS = "1000"  # some microseconds; what libgomp does by itself when it knows of more threads than cores
_OWN_THREADS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def wait_briefly() -> bool:
    """Tell GNU's OpenMP, which has not been loaded yet, how long threads may spin for each other.

    By itself it lets them spin for about a millisecond. Beside another process, the thread that they wait for is often
    one that cannot run because of that: `statekv watch` took 120 to 320 ms for a step of 6 ms on two cores. Alone
    nothing changes. A choice made in the environment is left alone.
    """
    if any(name in os.environ for name in _OWN_THREADS):
        return False
    os.environ["GOMP_SPINCOUNT"] = _SPINS
    return True
