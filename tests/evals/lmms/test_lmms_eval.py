"""lmms-eval itself, as it is installed: it finds statekv, and runs a task with the demo model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from statekv.config import Config
from statekv.engine.engine import Engine, load
from statekv.engine.session import Session
from statekv.errors import ConfigError, VideoError
from statekv.evals.lmms_eval import VideoQuestion, answer_all, question_of
from statekv.evals.results import read
from statekv.evals.runner import evaluate
from statekv.evals.tasks.cards import Cards
from statekv.video.writer import write_video
from tests.evals.lmms.local_task import NAME, write_task
from tests.evals.lmms.stock_lmms import needs_lmms, run_python
from tests.talk import shared_engine
from tests.tiny import video

BUDGET = 64


# As `python -m lmms_eval`, but that it need not read two thousand tasks of its own to find the one beside them.
_LMMS_EVAL = """
from lmms_eval.tasks import TaskManager
find = TaskManager.initialize_tasks
TaskManager.initialize_tasks = lambda manager, include_path, include_defaults: find(manager, include_path, False)
from lmms_eval.__main__ import cli_evaluate
cli_evaluate()
"""


@needs_lmms
def test_lmms_eval_answers_like_statekv_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same questions, in another order, through both: the same answers, word for word."""
    monkeypatch.setattr("statekv.evals.tasks.cards._SHORTEST", 32)  # of films that allow as many questions
    task = Cards(tmp_path / "films", frames=32, films=2)
    config = Config.of("statekv", budget=BUDGET, **task.settings)
    evaluate(load("demo"), task, {"statekv": config}, tmp_path / "ours", model="demo")
    (ours,) = (read(path) for path in (tmp_path / "ours").rglob("*.jsonl"))
    answered = {row["id"]: row["answered"] for row in ours.questions}

    # lmms-eval asks at the end of a video only.
    asked = [(video, q) for video in task.videos() for q in video.questions if q.at_seconds is None]
    asked = asked[::2] + asked[1::2]
    write_task(
        tmp_path / "task",
        ({"video": str(video.path), "question": q.prompt, "answer": q.expected} for video, q in asked),
    )
    arguments = ("--model_args", f"pretrained=demo,budget={BUDGET}", "--tasks", NAME, "--log_samples")
    places = ("--include_path", str(tmp_path / "task"), "--output_path", str(tmp_path / "theirs"))
    done = run_python(tmp_path, "-c", _LMMS_EVAL, "--model", "statekv", *arguments, *places)
    assert done.returncode == 0, done.stderr
    (samples,) = (tmp_path / "theirs").rglob(f"*samples_{NAME}.jsonl")
    theirs = {row["doc_id"]: row for row in map(json.loads, samples.read_text().splitlines())}

    assert len(asked) >= 12
    assert [theirs[n]["filtered_resps"] for n in range(len(asked))] == [answered[q.id] for _, q in asked]
    assert len(set(answered.values())) > 3  # not the same word to all
    (summary,) = (tmp_path / "theirs").rglob("*_results.json")
    right = sum(answered[q.id] == q.expected for _, q in asked)
    assert json.loads(summary.read_text())["results"][NAME]["right,none"] == pytest.approx(right / len(asked))


_WRONG = """
from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model, list_available_models
from statekv.errors import StateKVError

assert "statekv" in list_available_models()
kind = get_model("statekv")
for arguments in ("batch_size=4", "method=nonsense", "budget=0"):
    try:
        kind.create_from_arg_string(arguments)
    except StateKVError as error:
        print(error)
model = kind.create_from_arg_string("pretrained=demo,method=uniform", {"batch_size": "1", "device": "cpu"})
print(model._engine.config.max_frames, model._engine.config.fps, model.device)
about = {"task": "mmlu", "doc_id": 0, "repeats": 1}
request = Instance("loglikelihood", ("text", None, None, 0, "mmlu", "test"), 0, about)
for method in (model.loglikelihood, model.generate_until_multi_round):
    try:
        method([request])
    except StateKVError as error:
        print(error)
model.clean()
"""


@needs_lmms
def test_what_statekv_cannot_do_is_told_in_one_line(tmp_path: Path) -> None:
    done = run_python(tmp_path, "-c", _WRONG)
    assert done.returncode == 0, done.stderr
    batch, method, budget, settings, rating, rounds = done.stdout.splitlines()[-6:]
    assert batch == "batch_size is 4, but one stream is watched at a time (leave it out)"
    assert method.startswith("unknown method 'nonsense' (known: statekv, full, ")
    assert budget.startswith("budget is 0, but must be a whole number of at least 1")
    assert settings == "64 1.0 cpu"
    assert rating.startswith("task mmlu asks for log-likelihoods, but statekv answers questions")
    assert rounds.startswith("task mmlu asks for several rounds")


GREEDY = {"max_new_tokens": 16, "temperature": 0.0, "top_p": 1.0, "num_beams": 1, "do_sample": False}


def test_a_request_becomes_a_question() -> None:
    asked = question_of("Which?", GREEDY | {"until": ["\n\n"]}, ["a.mp4"], "videomme")
    assert asked == VideoQuestion("a.mp4", "Which?", {"max_new_tokens": 16, "stop": (), "do_sample": False})


@pytest.mark.parametrize(
    ("until", "stop"), [(None, ()), ("END", ("END",)), (["\n\n", "END", "."], ("END", ".")), ([], ())]
)
def test_ends_of_answers(until: Any, stop: tuple[str, ...]) -> None:
    answering = question_of("Which?", {"until": until}, "a.mp4", "some").answering
    assert answering == {"max_new_tokens": None, "stop": stop, "do_sample": False}


def test_drawn_answers() -> None:
    wanted = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "image_aspect_ratio": "pad"}
    drawn = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": None, "stop": ()}
    assert question_of("Which?", wanted, ["a.mp4"], "some").answering == drawn
    greedy = question_of("Which?", wanted | {"temperature": 0.0}, ["a.mp4"], "some").answering
    assert greedy == {"do_sample": False, "max_new_tokens": None, "stop": ()}


@pytest.mark.parametrize(
    ("visuals", "shown"),
    [([], "nothing"), (["a.mp4", "b.mp4"], "str, str"), ([b"\x89PNG"], "bytes"), (None, "NoneType")],
)
def test_other_than_one_video_is_an_error(visuals: Any, shown: str) -> None:
    with pytest.raises(ConfigError, match=f"task mmmu shows {shown}, but statekv watches one video"):
        question_of("Which?", GREEDY, visuals, "mmmu")


def test_beams_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"task some wants num_beams 4, .* \(--gen_kwargs num_beams=1\)"):
        question_of("Which?", GREEDY | {"num_beams": 4}, ["a.mp4"], "some")


def test_each_video_is_watched_once_and_answers_keep_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = shared_engine("internvl")
    clips = [str(tmp_path / name) for name in ("a.mp4", "b.mp4")]
    for clip, frames in zip(clips, (12, 8), strict=True):
        write_video(clip, video(frames), fps=2)
    # Each video has a question that no other has, and answers differ by their length at least.
    texts = ("What happens?", "Why?", "What happens?", "How many?")
    questions = [VideoQuestion(clips[n % 2], text, {"max_new_tokens": 3 + n}) for n, text in enumerate(texts)]
    expected = [alone(engine, question) for question in questions]
    assert len(set(expected)) == 4
    opened: list[str] = []
    plain = engine.open

    def counting(path: str) -> Session:
        opened.append(path)
        return plain(path)

    monkeypatch.setattr(engine, "open", counting)
    told: list[tuple[int, str]] = []
    assert answer_all(engine, questions, lambda number, answer: told.append((number, answer))) == expected
    assert opened == clips
    assert sorted(told) == list(enumerate(expected))


def alone(engine: Engine, question: VideoQuestion) -> str:
    with engine.open(question.video) as session:
        session.watch()
        return session.ask(question.prompt, **question.answering)


def test_a_missing_video_is_not_answered_somehow(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"absent\.mp4 does not exist"):
        answer_all(shared_engine("internvl"), [VideoQuestion(str(tmp_path / "absent.mp4"), "Which?")])
