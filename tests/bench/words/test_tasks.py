"""Questions about stories are answered beside the stream; a budget that holds everything answers as full attention."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
import torch

from statekv.bench.harness import read_methods
from statekv.bench.pretrained import Plan
from statekv.bench.words.stories import KINDS, Question, tell
from statekv.bench.words.tasks import Asked, Key, answer, measure, panels, read_tasks, rows
from statekv.config import Config
from statekv.errors import ConfigError
from statekv.models.families.text import TextModel, load_text
from statekv.runner.runner import ModelRunner
from tests.cli.test_cli import command
from tests.models.families.test_text import checkpoint

METHODS = read_methods(["statekv,statekv_weighted"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def model(folder: Path) -> TextModel:
    return load_text(folder, torch.device("cpu"), torch.float32)[0]


def encode(text: str) -> list[int]:
    """A token for each word."""
    return [zlib.crc32(word.encode()) % 600 for word in text.split()]


def in_pieces(text: str) -> list[int]:
    """Two tokens for a long word."""
    return encode(" ".join(" ".join((word[:5], word[5:])) for word in text.split()))


def asked(model: TextModel, shares: tuple[float, ...], tokens: int = 360) -> tuple[Asked, Plan]:
    plan = Plan(tokens=tokens, step=60, shares=shares, methods=METHODS)
    stories = [tell(seed, tokens, plan.step, encode) for seed in range(2)]
    return measure(model, stories, plan, KINDS, encode, lambda: None), plan


def test_a_budget_that_holds_everything_answers_as_full_attention(model: TextModel) -> None:
    found, _ = asked(model, (100.0,))
    for key, of in found.found.items():
        assert of.right == found.found[Key(100.0, "full", key.kind)].right
        assert all(abs(far) < 1e-6 for far in (*of.kl, *of.next_kl))
        assert of.alike == [1.0, 1.0]


def test_a_small_budget_does_not_and_rows_tell_how_far(model: TextModel) -> None:
    found, plan = asked(model, (10.0,))
    told = rows(found, plan, "tiny")
    assert [row.setting["task"] for row in told] == [kind for kind in KINDS for _ in range(3)]
    assert [row.subject for row in told[:3]] == ["full", *METHODS]
    assert all(kl > 0 for row in told if row.subject != "full" for kl in row.samples)
    assert all("guessing" in row.remark for row in told if row.subject == "full")
    assert all("the paper's" in row.remark for row in told if row.subject not in ("full", "statekv"))
    assert [(row.setting["share"], row.setting["budget"]) for row in told[:2]] == [("100 %", 360), ("10 %", 36)]
    right, far = panels(found)[:2]
    assert (right.title, right.mark) == ("needle, 10 % carried", 100 * found.guessing["needle"])
    assert (list(right.lines), list(far.lines)) == (["full", *METHODS], [*METHODS])
    assert all(low <= middle <= high for bars in (right, far) for middle, low, high in bars.lines.values())
    assert found.guessing["count"] == pytest.approx(1 / 8)


@torch.inference_mode()
def test_options_are_as_likely_as_the_stock_model_has_them_and_the_stream_goes_on(model: TextModel) -> None:
    story, question = torch.arange(100)[None], Question("needle", 100, "what", ("one", "elephant", "two"), 0)
    runner = ModelRunner(model)
    state = runner.open(Config.of("full"), room=0)
    runner.enter(state, model.step(story, 0))
    found = answer(runner, state, question, in_pieces)
    assert (state.tokens, state.position) == (100, 100)
    text, logs = in_pieces("Question: what"), []
    for word in question.options:
        option = in_pieces(word)
        ids = torch.tensor([[*story[0].tolist(), *text, *option]])
        again = runner.open(Config.of("full"), room=0)
        head = model.model.get_output_embeddings()
        of = head(runner.enter(again, model.step(ids, 0)))[0].log_softmax(-1)
        logs.append(sum(float(of[len(ids[0]) - len(option) - 1 + n, token]) for n, token in enumerate(option)))
    assert len(in_pieces("elephant")) == 2
    torch.testing.assert_close(found.options, torch.tensor(logs).double().log_softmax(-1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(answer(runner, state, question, in_pieces).options, found.options)


def test_tasks_are_read_and_what_is_none_is_refused(folder: Path) -> None:
    assert read_tasks("count, text,count") == ["count", "text"]
    for name in ("nothing", ""):
        with pytest.raises(ConfigError, match=f"no task '{name}' .one of text, needle, order, count"):
            read_tasks(name)
    found = command("bench", "pretrained", folder, "--task", "needle", "--text", folder / "config.json")
    assert found.code == 1
    assert "none of the tasks needle reads it" in found.err


def test_the_command_asks_beside_reading_text(folder: Path, tmp_path: Path) -> None:
    csv, text = tmp_path / "rows.csv", tmp_path / "text"
    text.write_text("a b c d " * 2000, encoding="utf-8")
    small = ("--windows", "2", "--step", "512", "--method", "statekv", "--tokens", "1024")
    found = command("bench", "pretrained", folder, "--task", "text,count", *small, "--text", text, "--csv", csv)
    assert found.code == 0, found.err
    assert "guessing 12.5 %" in found.out
    assert len(csv.read_text(encoding="utf-8").splitlines()) == 4
    assert csv.with_suffix(".png").is_file()
