"""`statekv ask`: one video, its questions, an answer each."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from statekv.cli import options
from statekv.cli.console import complain, doing, load, progress, to_json
from statekv.config import SETTINGS, Config, check_source
from statekv.errors import ConfigError, StateKVError, VideoError

if TYPE_CHECKING:
    from statekv.engine.engine import Engine
    from statekv.engine.session import Session


AskedVideo = Annotated[
    str | None, typer.Argument(help="A video file or URL; left out with --restore.", show_default=False)
]
AskedQuestions = Annotated[
    list[str] | None, typer.Argument(help="One or more questions; - reads lines of standard input.", show_default=False)
]
FromFile = Annotated[
    Path | None, typer.Option("--questions", help="A file with a question a line, asked behind the others; - as above.")
]
Restore = Annotated[
    Path | None,
    typer.Option(help="Go on with what --save kept; every argument is a question, model and settings stay."),
]


@options.generated()
def ask(
    context: typer.Context,
    video: AskedVideo = None,
    questions: AskedQuestions = None,
    *,
    file: FromFile = None,
    save: options.Save = None,
    restore: Restore = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per answer.")] = False,
    loading: options.Loading,
    method: options.Method = None,
    settings: options.Settings,
    stream: options.VideoStream = None,
) -> None:
    """Watch VIDEO once, answer every QUESTION about it."""
    given = [*([video] if restore is not None and video is not None else []), *(questions or ())]
    if not given and file is None:
        context.fail("Missing argument 'QUESTIONS...'.")
    asked = _read(given, file, stdin_is_video=restore is None and video == "-")
    # Checked before the model is loaded, and before torch is, which take their time.
    if any(not question.strip() for question in asked):
        raise ConfigError("the question is empty", "ask something about the video")
    if restore is None:
        Config.of(method, **settings)
        check_place(str(video), settings)
    check_target(save)
    if restore is None:
        name, engine = loading.get("model", "demo"), load(**loading, method=method, **settings)
        session = engine.open(str(video), stream=stream, **settings)
    else:
        name, engine = load_again(restore, loading, method=method, stream=stream)
        session = engine.restore(restore, **settings)
    with session:
        for question in asked:
            engine.check_question(question)
        if session.source is not None:  # else its frames were pushed
            _watch(session, save, restore)
        _save(session, save)
        for question in asked:
            _answer(session, question, name, as_json)


def _read(given: Iterable[str], file: Path | None, stdin_is_video: bool) -> list[str]:
    """The questions, those that stand elsewhere read from there; a ConfigError where there are none."""
    found: list[str] = []
    places: list[str | Path] = [*given, *([] if file is None else [file])]
    for place in places:
        if str(place) == "-":
            if stdin_is_video:
                raise ConfigError("standard input is the video, and cannot hold questions too", "use --questions FILE")
            found += _lines_of(sys.stdin)
        else:
            found += _lines_of(place) if isinstance(place, Path) else [place]
    return found


_LONGEST = 1 << 20  # characters of all questions together


def _lines_of(source: Path | TextIO | None) -> list[str]:
    """Lines of a file; None is standard input that is closed."""
    name = str(source) if isinstance(source, Path) else "standard input"
    try:
        if isinstance(source, Path):
            with source.open(encoding="utf-8") as file:
                text = file.read(_LONGEST)
        else:
            text = "" if source is None else source.read(_LONGEST)
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {(error.strerror or '').lower()}", "name another file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{name} is not UTF-8 text", "write a question a line") from None
    if len(text) == _LONGEST:
        raise ConfigError(f"{name} has {_LONGEST:,} characters or more", "ask less at once")
    found = [line.strip() for line in text.splitlines() if line.strip()]
    if not found:
        raise ConfigError(f"{name} holds no question", "write one a line")
    return found


def check_target(save: Path | None) -> None:
    """Complain of a folder that cannot be saved to; it is a matter of `torch`, which takes its time."""
    if save is not None:
        with doing(f"looking at {save}"):
            from statekv.cache import folder

        folder.check_target(save)


def _watch(session: Session, save: Path | None, restored: Path | None) -> None:
    """To the end; what was seen is saved where that is not reached."""
    # With the newest frames alone, that is how many are looked at together, not how many there are.
    expected = session.state.frames_expected if session.sampler.newest is None else None
    try:
        with progress() as bar:
            task = bar.add_task("frames", total=expected)
            session.watch(on_step=lambda step: bar.update(task, completed=step.frames))
    except KeyboardInterrupt:
        _save(session, save)
        going = f"; --restore {save} goes on from there" if save is not None and session.frames else ""
        complain(f"interrupted after {session.frames} frames{going}")
        raise typer.Exit(130) from None
    except VideoError as error:
        if restored is None or not session.frames:
            _save(session, save)
            raise
        complain(f"warning: {error.spelled(options.as_option)}; the answers are about what was seen")
    except StateKVError:
        _save(session, save)
        raise


def _save(session: Session, folder: Path | None) -> None:
    if folder is not None and session.frames:
        session.save(folder)


def _answer(session: Session, question: str, model: str, as_json: bool) -> None:
    before = session.seconds.answer
    if as_json:
        text, stats = session.ask(question), session.stats()
        stats["seconds"]["answer"] -= before
        typer.echo(to_json({"question": question, "text": text, "model": model, **stats}))
        return
    for piece in session.stream(question):
        typer.echo(piece, nl=False)
    typer.echo()


def check_place(source: str, settings: Mapping[str, Any], realtime: bool = False) -> None:
    """Complain of a source that is not there, or of a setting that means nothing with it (`realtime`: a file as if it
    were live), before the model is loaded.
    """
    from statekv.video.address import check_scheme, check_there, local_path, locate

    check_scheme(source, tuple(settings.get("schemes", SETTINGS["schemes"].default).split(",")))
    check_there(source)
    if locate(source).live or realtime:
        check_source(settings, "live")
    elif local_path(source) is not None:  # of a URL it is known when it is opened
        check_source(settings, "file")


def load_again(folder: Path, loading: Mapping[str, Any], **staying: Any) -> tuple[str, Engine]:
    """The model that a folder names, with what was typed in place of it.

    Args:
        loading: what was typed of `statekv.load`'s arguments.
        staying: options that a session has once and for all; None where they were not typed.

    Returns:
        The model's name, and the engine to restore the session on.

    Raises:
        ConfigError: such an option, unless it is the method that the session has.
        SaveError: the folder holds no session.
        ModelError: the model cannot be loaded.
    """
    with doing(f"reading {folder}"):
        from statekv.cache.folder import read_folder

    saved = read_folder(folder)
    with saved.reading():
        for name, value in sorted(staying.items()):
            if value is None or (name == "method" and Config.of_facts(saved.facts["stream"]["config"]).method == value):
                continue  # one command line for every start names it each time
            rule = f"--{name} was given with --restore, but a session stays as it was opened"
            raise ConfigError(rule, f"leave --{name} out, or watch the video again")
        then = saved.facts["model"]
        kept = {"dtype"} if "model" in loading else {"dtype", "revision"}
        again = {"model": then["name"], **{name: then[name] for name in kept}, **loading}
    if not again["model"]:
        raise ConfigError(f"{saved.folder} was saved with a model that has no name", "say where it is with --model")
    return again["model"], load(**again)
