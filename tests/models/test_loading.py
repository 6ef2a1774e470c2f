"""Checkpoints that load, and every way in which one may not: one line that says what is wrong and the way out."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import statekv
from statekv.errors import ConfigError, ModelError
from statekv.models.adapter import VideoModel
from statekv.models.loading import DEMO, identify, load_model, wrap_model
from tests.talk import adapted
from tests.tiny import FAMILIES, tiny

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
ROOT = Path(statekv.__file__).parent.parent

# Asks a question about two frames of each checkpoint, with whatever torchvision the caller arranged for.
ASK = """
import sys, torch, statekv
try:
    for folder in sys.argv[1:]:
        engine = statekv.load(folder, budget=20, max_new_tokens=3)
        session = engine.open()
        session.push([statekv.Frame(torch.zeros(3, 40, 56, dtype=torch.uint8), float(i)) for i in range(2)])
        print("answer", len(session.ask("What happens?")) > 0)
except statekv.StateKVError as error:
    print("told", type(error).__name__, error)
"""

# torchvision is nowhere, whatever is installed.
HIDDEN = """
import sys
class Hides:
    def __init__(self, finder): self.finder = finder
    def find_spec(self, name, *rest):
        return None if name.split(".")[0] == "torchvision" else self.finder.find_spec(name, *rest)
    def __getattr__(self, name): return getattr(self.finder, name)
sys.meta_path[:] = [Hides(finder) for finder in sys.meta_path]
"""


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(request.param).save(tmp_path_factory.mktemp(request.param))


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test asks the hub."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def changed(folder: Path, target: Path, drop: tuple[str, ...] = (), **config: Any) -> str:
    """A copy of a checkpoint without some files and with another configuration."""
    target.mkdir()
    for file in folder.iterdir():
        if not file.name.startswith(drop or ("\0",)):
            (target / file.name).write_bytes(file.read_bytes())
    values = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**values, **config}))
    return str(target)


def test_a_folder_loads_ready_for_work(folder: Path) -> None:
    model = load_model(str(folder))
    assert isinstance(model, VideoModel)
    assert not model.model.training
    assert model.kv_spec().dtype == torch.float32
    assert model.texts is not None
    assert set(model.prompts) == {"hf", "release"}


def test_dtype_and_device_are_what_was_asked_for(folder: Path) -> None:
    model = load_model(str(folder), dtype="bfloat16", device="cpu")
    assert model.kv_spec().dtype == torch.bfloat16
    assert model.kv_spec().devices == (torch.device("cpu"),) * 3


@EVERY_FAMILY
def test_a_model_that_the_user_holds_is_wrapped_without_texts(family: str) -> None:
    made = tiny(family)
    wrapped = wrap_model(made.model)
    assert wrapped.model is made.model
    assert wrapped.texts is None


@pytest.mark.parametrize("name", ["no/such-model-anywhere", "/no/such/folder", "nosuchname", "", "a/b/c"])
def test_an_unknown_model_is_told_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"unknown model|HF_HUB_OFFLINE is set") as told:
        load_model(name)
    assert repr(name) in told.value.message
    assert "demo" in told.value.hint
    assert "\n" not in str(told.value)


def test_a_hub_that_cannot_be_reached_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is it asked once more for every file: that is half a minute each."""
    monkeypatch.setattr("statekv.models.loading.why_hub_is_away", lambda: "cannot reach the hub")
    with pytest.raises(ModelError, match=r"cannot reach the hub, and 'no/such' is neither a folder nor in the hub's"):
        load_model("no/such")


@pytest.mark.parametrize("config", [{"model_type": "qwen2"}, {"model_type": "llava_next_video"}])
def test_an_unsupported_architecture_is_told_with_the_supported_ones(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"{config['model_type']!r}.*supported: internvl, qwen3_vl"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("text", ["{}", "{broken", '{"model_type": "nobody_knows_this"}'])
def test_a_configuration_that_says_nothing_is_told(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError) as told:
        load_model(str(tmp_path))
    assert "\n" not in str(told.value)


def test_code_in_a_checkpoint_is_not_run_unless_trusted(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="set trust_remote_code to trust it"):
        load_model(str(tmp_path))
    assert not ran.exists()


@pytest.mark.parametrize(
    ("missing", "told_about"),
    [
        (("tokenizer",), "tokenizer"),
        (("model.safetensors",), "weights"),
        (("preprocessor_config", "video_preprocessor_config", "processor_config"), "preprocessor_config.json"),
    ],
)
def test_a_missing_file_is_told_by_name(
    folder: Path, tmp_path: Path, missing: tuple[str, ...], told_about: str
) -> None:
    with pytest.raises(ModelError, match=told_about) as told:
        load_model(changed(folder, tmp_path / "copy", drop=missing))
    assert "\n" not in str(told.value)
    assert told.value.hint


def test_damaged_weights_are_told_as_such(folder: Path, tmp_path: Path) -> None:
    copy = Path(changed(folder, tmp_path / "copy"))
    (copy / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ModelError, match="weights"):
        load_model(str(copy))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_told_by_name(folder: Path, tmp_path: Path, value: float) -> None:
    shutil.copytree(folder, tmp_path / "broken")
    path = next((tmp_path / "broken").glob("*.safetensors"))
    weights = load_file(path)
    name = sorted(name for name, weight in weights.items() if weight.is_floating_point())[3]
    weights[name].view(-1)[-1] = value
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"not all finite: .* holds NaN or infinity"):
        load_model(tmp_path / "broken")


def test_weights_of_another_size_are_told_as_such(folder: Path, tmp_path: Path) -> None:
    text = json.loads((folder / "config.json").read_text())["text_config"]
    with pytest.raises(ModelError, match="weights"):
        load_model(changed(folder, tmp_path / "copy", text_config={**text, "intermediate_size": 96}))


def test_wrong_settings_are_told_before_anything_is_loaded() -> None:
    for arguments, told in (({"method": "best"}, "best"), ({"bugdet": 1}, "bugdet"), ({"budget": -1}, "budget")):
        with pytest.raises(ConfigError, match=told):
            statekv.load("no/such-model-anywhere", **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"dtype": "float99"}, {"device": "warp"}])
def test_a_wrong_dtype_or_device_is_told_by_name(folder: Path, wrong: dict[str, str]) -> None:
    (value,) = wrong.values()
    with pytest.raises((ConfigError, ModelError), match=value):
        load_model(str(folder), **wrong)  # type: ignore[arg-type]


def run(code: str, *arguments: str, extra_path: Path | None = None) -> subprocess.CompletedProcess[str]:
    paths = [str(path) for path in (extra_path, ROOT) if path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_it_works_where_torchvision_is_absent(tmp_path: Path) -> None:
    folders = [str(tiny(family).save(tmp_path / family)) for family in FAMILIES]
    done = run(HIDDEN + ASK, *folders)
    assert done.stdout.splitlines() == ["answer True"] * len(FAMILIES), done.stderr


def test_a_torchvision_that_does_not_fit_torch_is_told_in_one_line(tmp_path: Path) -> None:
    package, info = tmp_path / "torchvision", tmp_path / "torchvision-0.99.0.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.99.0\n")
    done = run(ASK, str(tiny("internvl").save(tmp_path / "checkpoint")), extra_path=tmp_path)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("told ModelError")
    assert "torchvision" in line
    assert "pip uninstall torchvision" in line


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
