"""lmms-eval itself, as it is installed: it finds statekv, and runs a task with the demo model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from statekv.config import Config
from statekv.engine.engine import load
from statekv.evals.results import read
from statekv.evals.runner import evaluate
from statekv.evals.tasks.cards import Cards
from tests.evals.lmms.local_task import NAME, write_task
from tests.evals.lmms.stock_lmms import needs_lmms, run_python

BUDGET = 64


@needs_lmms
def test_lmms_eval_answers_like_statekv_eval(tmp_path: Path) -> None:
    """The same questions, in another order, through both: the same answers, word for word."""
    task = Cards(tmp_path / "films", frames=128, films=2)
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
    done = run_python(tmp_path, "-m", "lmms_eval", "--model", "statekv", *arguments, *places)
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
