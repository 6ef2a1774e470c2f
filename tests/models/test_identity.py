"""What tells checkpoints apart, and what does not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import statekv
from statekv.models.identity import identify
from statekv.models.loading import DEMO
from tests.talk import adapted
from tests.tiny import FAMILIES, tiny


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_weights_are_the_same_checkpoint(family: str) -> None:
    one, other = identify(adapted(tiny(family))), identify(adapted(tiny(family)))
    assert one == other
    assert (one.kind, one.dtype, one.name) == (family, "float32", "")


def test_one_factor_on_one_tensor_is_seen() -> None:
    model = adapted(tiny("internvl"))
    before = identify(model)
    for weight in (model.language_model.norm.weight, model.model.model.vision_tower.embeddings.cls_token):
        with torch.no_grad():
            weight.mul_(1.01).add_(1e-6)
        changed = identify(model)
        assert changed.weights != before.weights
        assert dataclasses.replace(changed, weights=before.weights) == before
        before = changed


def test_another_dtype_is_seen() -> None:
    model = adapted(tiny("internvl"))
    before = identify(model)
    model.model.bfloat16()
    assert identify(model).dtype == "bfloat16"
    assert identify(model).weights != before.weights


def test_the_name_is_what_can_be_loaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny("internvl").save(tmp_path / "checkpoint")
    monkeypatch.chdir(tmp_path)
    assert identify(statekv.load("checkpoint").model).name == str(folder.resolve())
    assert identify(statekv.load("demo").model).name == "demo"
    assert identify(statekv.load(str(DEMO)).model).name == "demo"
