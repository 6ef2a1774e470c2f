"""`statekv ask`: one video, its questions, an answer each."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

import statekv
from statekv.cli import options
from statekv.cli.console import notes, progress
from statekv.config import ATTENTION_DIALS, CAPS, Config
from statekv.errors import ConfigError, StateKVError, VideoError

if TYPE_CHECKING:
    from statekv.engine.engine import Engine
    from statekv.engine.session import Session


_DEFAULT = Config()
_SETTINGS = (
    "budget",
    "fps",
    "max_frames",
    "max_new_tokens",
    "carry",
    "recall",
    "sinks",
    "pin_prefix",
    *ATTENTION_DIALS,
    "retrieve",
    "retrieve_newest",
    "retrieve_carried",
    "retrieve_positions",
    "last_frames",
    "layout",
    "horizon",
    "on_horizon",
    *CAPS,
    "disk_folder",
    "bits",
    "kernel",
    "score_every",
    "vision_batch",
    "graph",
    "pack",
    "seed",
)


def ask(
    context: typer.Context,
    video: options.AskedVideo = None,
    questions: options.AskedQuestions = None,
    model: options.Model = "demo",
    method: options.Method = None,
    budget: options.Budget = _DEFAULT.budget,
    fps: options.Fps = 1.0,
    max_frames: options.MaxFrames = None,
    max_new_tokens: options.MaxNewTokens = _DEFAULT.max_new_tokens,
    carry: options.Carry = None,
    recall: options.Recall = None,
    sinks: options.Sinks = _DEFAULT.sinks,
    pin_prefix: options.PinPrefix = None,
    decay: options.Decay = _DEFAULT.decay,
    value_norms: options.ValueNorms = False,
    layer_slope: options.LayerSlope = _DEFAULT.layer_slope,
    pin_newest: options.PinNewest = _DEFAULT.pin_newest,
    coverage: options.Coverage = _DEFAULT.coverage,
    retrieve: options.Retrieve = _DEFAULT.retrieve,
    retrieve_newest: options.RetrieveNewest = _DEFAULT.retrieve_newest,
    retrieve_carried: options.RetrieveCarried = False,
    retrieve_positions: options.RetrievePositions = _DEFAULT.retrieve_positions,
    last_frames: options.LastFrames = _DEFAULT.last_frames,
    layout: options.LayoutName = _DEFAULT.layout,
    horizon: options.Horizon = None,
    on_horizon: options.OnHorizon = None,
    memory: options.Memory = None,
    host_memory: options.HostMemory = None,
    disk: options.Disk = None,
    disk_folder: options.DiskFolder = None,
    bits: options.Bits = None,
    kernel: options.Kernel = _DEFAULT.kernel,
    score_every: options.ScoreEvery = _DEFAULT.score_every,
    vision_batch: options.VisionBatch = _DEFAULT.vision_batch,
    graph: options.Graph = _DEFAULT.graph,
    pack: options.Pack = _DEFAULT.pack,
    seed: options.Seed = _DEFAULT.seed,
    stream: options.VideoStream = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    save: options.Save = None,
    restore: options.Restore = None,
    as_json: options.AsJson = False,
) -> None:
    """Watch VIDEO once, answer every QUESTION about it."""
    given = dict(locals())
    asked = list(questions or ())
    if restore is not None and video is not None:
        asked.insert(0, video)
    # Checked before the model is loaded, which takes its time.
    if not asked:
        context.fail("Missing argument 'QUESTIONS...'.")
    _check(asked, save)
    _watch_and_answer(given, typed_options(context), asked)


def _watch_and_answer(given: dict[str, Any], typed: set[str], questions: list[str]) -> None:
    save, restore = given["save"], given["restore"]
    name, engine, session = _open(given) if restore is None else _restore(given, typed)
    with session:
        for question in questions:
            engine.check_question(question)
        if session.source is not None:  # else its frames were pushed
            _watch(session, save, restore)
        _save(session, save)
        for question in questions:
            _answer(session, question, name, given["as_json"])


def _open(given: dict[str, Any]) -> tuple[str, Engine, Session]:
    settings = {name: given[name] for name in _SETTINGS if given[name] is not None}
    Config.of(given["method"], **settings)
    _check_source(given["video"])
    loading = {name: given[name] for name in LOADING}
    engine = statekv.load(given["model"], given["method"], **loading, **settings)
    return given["model"], engine, engine.open(given["video"], stream=given["stream"])


def _restore(given: dict[str, Any], typed: set[str]) -> tuple[str, Engine, Session]:
    """The session in a folder, on the model that the folder names; both with what was typed beside it."""
    name, engine = load_again(given["restore"], given, typed)
    anew = {name: given[name] for name in typed & set(_SETTINGS)}
    return name, engine, engine.restore(given["restore"], **anew)


def _check(questions: list[str], save: Path | None) -> None:
    from statekv.cache.folder import check_target

    if any(not question.strip() for question in questions):
        raise ConfigError("the question is empty", "ask something about the video")
    if save is not None:
        check_target(save)


def _watch(session: Session, save: Path | None, restored: Path | None) -> None:
    """To the end; what was seen is saved where that is not reached."""
    # With the newest frames alone, that is how many are looked at together, not how many there are.
    expected = None if session.state.config.recall == "last_frames" else session.state.frames_expected
    with progress() as bar:
        task = bar.add_task("frames", total=expected)
        try:
            session.watch(on_step=lambda step: bar.update(task, completed=step.frames))
        except KeyboardInterrupt:
            _save(session, save)
            going = f"; --restore {save} goes on from there" if save is not None else ""
            notes.print(f"statekv: interrupted after {session.frames} frames{going}", markup=False, soft_wrap=True)
            raise typer.Exit(130) from None
        except VideoError as error:
            if restored is None or not session.frames:
                _save(session, save)
                raise
            notes.print(f"statekv: warning: {error}; the answers are about what was seen", markup=False, soft_wrap=True)
        except StateKVError:
            _save(session, save)
            raise


def _save(session: Session, folder: Path | None) -> None:
    if folder is not None and session.frames:
        session.save(folder)


def _answer(session: Session, question: str, model: str, as_json: bool) -> None:
    before = session.seconds.answer
    if as_json:
        text = session.ask(question)
        typer.echo(json.dumps(_report(session, model, question, text, session.seconds.answer - before)))
        return
    for piece in session.stream(question):
        typer.echo(piece, nl=False)
    typer.echo()


def _report(session: Session, model: str, question: str, text: str, answer_seconds: float) -> dict[str, Any]:
    from statekv.ops import implementation

    state, seconds = session.state, dataclasses.asdict(session.seconds)
    spec = state.spec
    return {
        "question": question,
        "text": text,
        "model": model,
        "method": state.config.method,
        "carry": state.config.carry,
        "recall": state.config.recall,
        "layout": state.config.layout,
        "kernel": implementation(state.config.kernel, spec.devices[0], spec.dtype, spec.head_dim),
        "budget": state.config.budget,
        "frames": session.frames,
        "tokens": state.tokens,
        "carried": state.carried.length,
        "positions": state.position,
        "horizon": state.horizon,
        "compacted": state.compaction.factor,
        "forgotten": state.forgotten,
        "seconds": {**seconds, "answer": answer_seconds},
        "bytes": state.nbytes,
    }


def _check_source(video: str) -> None:
    from statekv.video.address import check_file, local_path

    path = local_path(video)
    if path is not None:
        check_file(path)


LOADING = ("dtype", "device", "device_map", "revision", "trust_remote_code")
_STAYS = ("method", "stream")


def typed_options(context: typer.Context) -> set[str]:
    """Names of the options on the command line, all others having their defaults."""
    sources = ((name, context.get_parameter_source(name)) for name in context.params)
    return {name for name, source in sources if source is not None and source.name == "COMMANDLINE"}


def load_again(folder: Path, given: Mapping[str, Any], typed: Collection[str]) -> tuple[str, Engine]:
    """The model that a folder names, with what was typed in place of it.

    Args:
        folder: a saved session.
        given: every option's value.
        typed: names of those on the command line.

    Returns:
        The model's name, and the engine to restore the session on.

    Raises:
        ConfigError: an option that a session has once and for all, unless it is the method that it has.
        SaveError: the folder holds no session.
        ModelError: the model cannot be loaded.
    """
    from statekv.cache.folder import read_folder

    saved = read_folder(folder)
    with saved.reading():
        for name in sorted(set(_STAYS) & set(typed)):
            if name == "method" and Config(**saved.facts["stream"]["config"]).method == given["method"]:
                continue  # one command line for every start names it each time
            rule = f"--{name} was given with --restore, but a session stays as it was opened"
            raise ConfigError(rule, f"leave --{name} out, or watch the video again")
        then = saved.facts["model"]
        name = given["model"] if "model" in typed else then["name"]
        kept = {"dtype"} if "model" in typed else {"dtype", "revision"}
        loading = {name: given[name] for name in LOADING} | {name: then[name] for name in kept - set(typed)}
    if not name:
        raise ConfigError(f"{saved.folder} was saved with a model that has no name", "say where it is with --model")
    return name, statekv.load(name, **loading)
