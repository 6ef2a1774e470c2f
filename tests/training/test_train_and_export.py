"""Training runs, resumes where it stopped, and what it exports is an ordinary checkpoint."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AttentionInterface, AutoConfig

import statekv
from statekv.models.loading import DEMO
from tests.talk import some_frames
from training import export as exporting
from training import train as training_module
from training.batch import BatchMaker
from training.export import export
from training.heads import Heads
from training.model import build_model
from training.tokenizer import build_tokenizer
from training.train import CURRICULUM, REFINEMENT, REVIEW, Stages, clip_length, learning_rate, loss_of, train

STEPS = 3
SHORT = ((0.5, 2, 3), (0.5, 3, 4))


@pytest.fixture(autouse=True, scope="module")
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(out: Path, stop: int = 0, seed: int = 1) -> dict[str, torch.Tensor]:
    """Train on one clip or two a step; the weights."""
    threads = torch.get_num_threads()
    train(out, None, SHORT, STEPS, seed=seed, peak=1e-3, frames_per_step=4, threads=threads, stop=stop)
    state = torch.load(out / "state.pt", weights_only=True)
    assert state["step"] == (stop or STEPS)
    weights: dict[str, torch.Tensor] = state["model"]
    return weights


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "new" / "run"
    run(out)
    return out


def assert_equal_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_few_steps_run_and_change_the_weights(trained: Path) -> None:
    weights = torch.load(trained / "state.pt", weights_only=True)["model"]
    torch.manual_seed(1)
    fresh = build_model(build_tokenizer()).state_dict()
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    changed = [name for name in fresh if not torch.equal(fresh[name], weights[name])]
    assert len(changed) > 0.9 * len(fresh)
    assert not list(trained.glob("*.tmp"))


def test_stopping_and_resuming_equals_another_run_that_never_stopped(trained: Path, tmp_path: Path) -> None:
    run(tmp_path, stop=2)
    assert_equal_weights(run(tmp_path), torch.load(trained / "state.pt", weights_only=True)["model"])


def test_a_finished_run_stays_as_it_is(trained: Path) -> None:
    before = (trained / "state.pt").read_bytes()
    run(trained)
    assert (trained / "state.pt").read_bytes() == before


def test_the_loss_falls_on_a_batch_seen_again() -> None:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer).train()
    batch = BatchMaker(tokenizer).make(np.random.default_rng(0), clips=2, frames=2)
    heads = Heads(model, tokenizer)
    optimiser = torch.optim.AdamW([*model.parameters(), *heads.parameters()], lr=2e-3)
    losses = []
    for _ in range(8):
        answers, readings = loss_of(model, heads, batch)
        optimiser.zero_grad()
        (answers + readings).backward()
        optimiser.step()
        losses.append(answers.item())
    assert losses[0] > 5
    assert losses[-1] < 0.6 * losses[0]


def test_attention_in_float32_is_attention() -> None:
    """What `train` swaps in gives the loss that transformers' own attention gives."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer).eval()
    batch = BatchMaker(tokenizer).make(np.random.default_rng(0), clips=2, frames=3)
    with torch.no_grad():
        heads = Heads(model, tokenizer)
        expected = loss_of(model, heads, batch)
        AttentionInterface.register("float32", training_module.attention_in_float32)
        model.set_attn_implementation("float32")
        torch.testing.assert_close(loss_of(model, heads, batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stages", [CURRICULUM, REFINEMENT], ids=["first run", "refinement"])
def test_clips_grow_with_training_and_short_ones_come_back(stages: Stages) -> None:
    rng = np.random.default_rng(0)
    begun, shortest = 0.0, stages[0][2]
    for stage, (share, fewest, most) in enumerate(stages):
        times = begun + share * np.linspace(0.01, 0.99, 400)
        lengths = np.array([clip_length(rng, time, stages) for time in times])
        assert lengths.min() >= stages[0][1]
        assert (fewest + most) / 2 < lengths.max() <= most
        assert np.mean(lengths <= shortest) > 0.5 * REVIEW / (stage + 1)
        assert np.mean(lengths >= fewest) > 1 - REVIEW
        begun += share
    assert begun == pytest.approx(1.0)


def test_the_learning_rate_warms_up_and_decays() -> None:
    rates = [learning_rate(step, 1000, 1e-3) for step in range(1000)]
    assert rates[0] < 2e-5
    assert 0.9e-3 < max(rates) <= 1e-3
    assert rates[99:] == sorted(rates[99:], reverse=True)
    assert 0 < rates[-1] < 5e-5


# Export


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("checkpoints") / "new" / "demo"
    export(trained, target)
    return target


def test_the_exported_folder_loads_and_answers(exported: Path) -> None:
    engine = statekv.load(str(exported), budget=20)
    with engine.open() as session:
        session.push(some_frames(4))
        assert isinstance(session.ask("how many readings?", max_new_tokens=4), str)
        assert session.state.carried.length == 20
    engine.close()


def test_the_exported_weights_are_the_trained_ones_in_half_precision(exported: Path, trained: Path) -> None:
    weights = torch.load(trained / "state.pt", weights_only=True)["model"]
    engine = statekv.load(str(exported))
    loaded = engine.model.model.state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name].half().float()) for name in weights)
    assert all(tensor.dtype == torch.float16 for tensor in load_file(exported / "model.safetensors").values())
    engine.close()


def test_the_exported_files_are_those_of_the_shipped_checkpoint(exported: Path) -> None:
    card = "README.md"  # written by hand
    assert {*(path.name for path in exported.iterdir()), card} == {path.name for path in DEMO.iterdir()}
    for path in exported.glob("*processor*.json"):
        found, shipped = (json.loads((folder / path.name).read_text()) for folder in (exported, DEMO))
        assert found == shipped, path.name
    written_by = ("transformers_version", "_name_or_path", "dtype")
    settings = [AutoConfig.from_pretrained(folder).to_dict() for folder in (exported, DEMO)]
    assert settings[0].keys() == settings[1].keys()
    assert all(settings[0][name] == settings[1][name] for name in settings[0] if name not in written_by)


def test_exporting_from_the_command_line(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["export", "--run", str(trained), "--target", str(tmp_path / "demo")]
    monkeypatch.setattr(sys, "argv", line)
    exporting.main()
    assert (tmp_path / "demo" / "model.safetensors").exists()
