"""`statekv ask`: one video, its questions, an answer each."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import typer

import statekv
from statekv.cli import options
from statekv.cli.console import notes, progress
from statekv.config import ATTENTION_DIALS, Config
from statekv.errors import ConfigError

if TYPE_CHECKING:
    from statekv.session import Session

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
    "kernel",
    "score_every",
    "vision_batch",
    "graph",
    "pack",
    "seed",
)


def ask(
    video: options.Video,
    questions: options.Questions,
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
    as_json: options.AsJson = False,
) -> None:
    """Watch VIDEO once, answer every QUESTION about it."""
    given = dict(locals())
    settings = {name: given[name] for name in _SETTINGS if given[name] is not None}
    # Checked before the model is loaded, which takes its time.
    if any(not question.strip() for question in questions):
        raise ConfigError("the question is empty", "ask something about the video")
    Config.of(method, **settings)
    _check_source(video)
    loading = {name: given[name] for name in ("dtype", "device", "device_map", "revision", "trust_remote_code")}
    engine = statekv.load(model, method, **loading, **settings)
    with engine.open(video, stream=stream) as session:
        for question in questions:
            engine.check_question(question)
        _watch(session)
        for question in questions:
            _answer(session, question, model, as_json)


def _watch(session: Session) -> None:
    # With the newest frames alone, that is how many are looked at together, not how many there are.
    expected = None if session.state.config.recall == "last_frames" else session.state.frames_expected
    with progress() as bar:
        task = bar.add_task("frames", total=expected)
        try:
            session.watch(on_step=lambda step: bar.update(task, completed=step.frames))
        except KeyboardInterrupt:
            notes.print(f"statekv: interrupted after {session.frames} frames", markup=False)
            raise typer.Exit(130) from None


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
    geometry = state.geometry
    return {
        "question": question,
        "text": text,
        "model": model,
        "method": state.config.method,
        "carry": state.config.carry,
        "recall": state.config.recall,
        "layout": state.config.layout,
        "kernel": implementation(state.config.kernel, geometry.devices[0], geometry.dtype, geometry.head_dim),
        "budget": state.config.budget,
        "frames": session.frames,
        "tokens": state.tokens,
        "carried": state.carried.length,
        "positions": state.position,
        "horizon": state.horizon,
        "seconds": {**seconds, "answer": answer_seconds},
        "bytes": state.nbytes,
    }


def _check_source(video: str) -> None:
    from statekv.video.source import check_file, local_path

    path = local_path(video)
    if path is not None:
        check_file(path)
