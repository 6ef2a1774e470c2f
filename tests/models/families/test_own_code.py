"""Code that comes with a checkpoint: run only if trusted, at one commit, and completed for transformers 5."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import statekv
from statekv.errors import ModelError
from statekv.models import FAMILIES
from statekv.models.families.own_code import completed_config, completed_model
from statekv.models.loading import load_model
from tests.models.families.eagle_stand_in import Eagle2_5_VLConfig, Eagle2_5_VLForConditionalGeneration
from tests.talk import QUESTION, UNLIMITED, frames_of, inputs_of, stock_answer
from tests.tiny import tiny, video

NAME = "nvidia/Eagle2.5-8B"


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test asks the hub, and the code of checkpoints is copied where the test ends with it."""
    import huggingface_hub.constants
    from transformers import dynamic_module_utils

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny("eagle2_5").save(tmp_path / "checkpoint")


def test_a_folder_with_code_loads_and_answers_as_stock_does(folder: Path) -> None:
    engine = statekv.load(str(folder), trust_remote_code=True, max_new_tokens=6, **UNLIMITED)
    assert type(engine.model.model).__name__ == "Eagle2_5_VLForConditionalGeneration"
    assert type(engine.model.model).__mro__[1] is not Eagle2_5_VLForConditionalGeneration  # the folder's own copy
    session = engine.open()
    session.push(frames_of(video(3)))
    made = tiny("eagle2_5")
    expected = stock_answer(made, inputs_of(made, video(3), QUESTION)).tokens
    assert session.ask(QUESTION) == made.tokenizer.decode(expected, skip_special_tokens=True)


def test_it_loads_although_its_configuration_asks_for_flash_attention(folder: Path) -> None:
    """As the public checkpoints' do; without our class the code insists on it."""
    values = json.loads((folder / "config.json").read_text())
    for part in (values, values["text_config"]):
        part["_attn_implementation"] = "flash_attention_2"
    values.pop("_attn_implementation_autoset")  # written by transformers 4 alone
    (folder / "config.json").write_text(json.dumps(values))
    model = load_model(str(folder), trust_remote_code=True, dtype="bfloat16").model
    assert model.config.text_config._attn_implementation == "sdpa"
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_untrusted_code_is_not_run(folder: Path) -> None:
    code = folder / "modeling_eagle2_5_vl.py"
    code.write_text(f"open({str(folder / 'ran')!r}, 'w')\n{code.read_text()}")
    with pytest.raises(ModelError, match="trust_remote_code=True"):
        load_model(str(folder))
    assert not (folder / "ran").exists()


def test_a_known_checkpoint_asks_for_trust_before_anything_is_fetched() -> None:
    with pytest.raises(ModelError, match=rf"{NAME} brings code of its own .*trust_remote_code=True"):
        load_model(NAME)


def test_without_a_commit_known_here_one_has_to_be_named() -> None:
    (checkpoint,) = FAMILIES["eagle_2_5_vl"].checkpoints
    assert (checkpoint.name, checkpoint.revision) == (NAME, None)
    with pytest.raises(ModelError, match=r"no commit of it is pinned here .*name the commit with revision"):
        load_model(NAME, trust_remote_code=True)
    with pytest.raises(ModelError, match="unknown model"):  # there is no hub here
        load_model(NAME, trust_remote_code=True, revision="0" * 40)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("import no_such_package_anywhere", "no_such_package_anywhere"),
        ("class Eagle2_5_VLConfig: pass", "has no attribute"),
    ],
)
def test_code_that_does_not_run_here_is_told_in_one_line(folder: Path, line: str, told: str) -> None:
    (folder / "modeling_eagle2_5_vl.py").write_text(f"{line}\n")
    with pytest.raises(ModelError, match=f"does not run here: .*{told}") as error:
        load_model(str(folder), trust_remote_code=True)
    assert "\n" not in str(error.value)


def test_completing_changes_no_weight_and_no_name() -> None:
    values: dict[str, Any] = {
        "text_config": {"hidden_size": 64, "num_hidden_layers": 1},
        "vision_config": {"num_hidden_layers": 1},
    }
    with pytest.raises(AttributeError, match="_attn_implementation_autoset"):
        Eagle2_5_VLConfig(**values).to_dict()
    config = completed_config(Eagle2_5_VLConfig)(**values)
    assert config.to_dict()["text_config"]["hidden_size"] == 64
    with torch.device("meta"):
        model = completed_model(Eagle2_5_VLForConditionalGeneration)(config)
        with pytest.raises((ImportError, ValueError), match=r"Flash ?Attention"):
            Eagle2_5_VLForConditionalGeneration(config)
    assert {name.split(".")[0] for name in model.state_dict()} == {"vision_model", "mlp1", "language_model"}
    assert type(model).__name__ == "Eagle2_5_VLForConditionalGeneration"
    assert type(config).__name__ == "Eagle2_5_VLConfig"
