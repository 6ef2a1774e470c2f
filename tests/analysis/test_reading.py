"""Attention in a text: what is measured is the stream that the policy makes, and the curves have their limits."""

from __future__ import annotations

import pytest
import torch

from statekv.analysis.concentration import BUDGETS
from statekv.analysis.reading import read
from statekv.config import Config
from statekv.errors import ConfigError
from statekv.models.families.text import TextModel, load_text
from tests.models.families.test_text import checkpoint

IDS = torch.randint(0, 600, (1, 70), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    return load_text(checkpoint(tmp_path_factory.mktemp("text")), torch.device("cpu"), torch.float32)[0]


def test_the_best_keys_capture_what_stock_attention_says(model: TextModel) -> None:
    found = read(model, Config(budget=8), IDS, 16)
    assert (found.steps, found.tokens, found.length) == (5, 70, "5 steps, 70 tokens")
    stock = type(model.model)(model.model.config).eval()
    stock.load_state_dict(model.model.state_dict())
    stock.set_attn_implementation("eager")
    with torch.inference_mode():
        attention = stock(IDS, output_attentions=True).attentions
    for shares, whole in zip(found.shares, attention, strict=True):
        captured = []
        for start in range(16, 70, 16):
            rows = whole[0, :, start : start + 16, :start].sum(1)  # [heads, history]
            past = rows.view(2, -1, start).sum(1)  # of a KV head
            captured.append((past.topk(8).values.sum(-1) / past.sum(-1)).mean())
        assert shares.captured[BUDGETS.index(8)] == pytest.approx(float(torch.stack(captured).mean()), abs=1e-5)


def test_a_budget_that_holds_everything_captures_everything(model: TextModel) -> None:
    steps: list[int] = []
    found = read(model, Config(budget=100), IDS, 16, layers=[1], on_step=steps.append)
    (shares,) = found.shares
    assert shares.layer == 1
    assert shares.carried == pytest.approx(1)
    assert shares.captured[-1] == pytest.approx(1)
    assert shares.churn[-1] == 0
    assert steps == [16, 32, 48, 64, 70]


def test_a_small_budget_captures_less_than_the_best_keys(model: TextModel) -> None:
    for shares in read(model, Config(carry="recent", budget=8), IDS, 16).shares:
        assert 0 < shares.carried < shares.best < 1


def test_what_cannot_be_read_is_refused(model: TextModel) -> None:
    with pytest.raises(ConfigError, match=r"has 32 tokens, which are less than 3 steps of 16 \(give a longer text"):
        read(model, Config(budget=8), IDS[:, :32], 16)
    with pytest.raises(ConfigError, match="layer 2 is not there, the model has 0 to 1"):
        read(model, Config(budget=8), IDS, 16, layers=[2])
    with pytest.raises(ConfigError, match="nothing to look into"):
        read(model, Config.of("full"), IDS, 16)
