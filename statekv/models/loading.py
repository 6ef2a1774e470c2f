"""From a hub id, a folder or "demo" to a model with its texts."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from statekv.errors import ConfigError, ModelError
from statekv.models import FAMILIES, adapter_of
from statekv.models.adapter import Texts, VideoModel
from statekv.models.checkpoint import MISFITS, check_config, read_checkpoint_json, told, why_hub_is_away

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

DEMO = Path(__file__).parent.parent / "checkpoints" / "demo"


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    device_map: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> VideoModel:
    """Load a checkpoint with transformers and wrap it in its family's adapter.

    Args:
        name_or_path: a hub id, a folder in the Hugging Face layout, or "demo".
        dtype: "auto" takes the checkpoint's own on CUDA and float32 on a CPU.
        device: "auto" takes CUDA where there is one, else the CPU; must be left alone with a device_map.
        device_map: passed on to transformers (needs accelerate).
        revision: branch, tag or commit on the hub; known checkpoints with code of their own are loaded only at one
            that is named, here or in the table.
        trust_remote_code: run code that comes with the checkpoint; off unless asked for.

    Raises:
        ConfigError: an unknown dtype, or a device that is not there.
        ModelError: not found, of an unsupported architecture, or not loadable, with the way out.
    """
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise ModelError(f"the model is {name_or_path!r}, but must be a name or a folder", "give demo, or a hub id")
    name_or_path = os.fspath(name_or_path)
    source = str(DEMO) if name_or_path == "demo" else name_or_path
    try:
        Path(source).exists()
    except (OSError, ValueError) as error:
        raise _unknown(source[:80], "", getattr(error, "strerror", None) or str(error)) from None
    revision = _revision_of_own_code(name_or_path, revision, trust_remote_code)
    away = why_hub_is_away() if _is_hub_id(source) and not Path(source).exists() else ""
    hub: dict[str, Any] = {"revision": revision} if revision else {}
    hub |= {"local_files_only": True} if away else {}  # what is in its cache still loads
    config = _read_config(source, name_or_path, trust_remote_code, hub, away)
    family, own_code = adapter_of(config.model_type), FAMILIES[config.model_type].own_code
    if own_code and not trust_remote_code:
        raise _untrusted(name_or_path)
    texts = _read_texts(source, trust_remote_code, hub, {"config": config} if own_code else {})
    dtype, place = read_dtype(dtype), read_device(device)
    if dtype == "auto" and device_map is None and place.type == "cpu":
        dtype = torch.float32
    weights: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code, **hub}
    if device_map is not None:
        weights["device_map"] = device_map
    elif getattr(config, "quantization_config", None) is not None:
        weights["device_map"] = {"": place}  # packed weights are made where they stay
    read_checkpoint_json(source, "generation_config.json", **hub)
    model = _read_weights(source, name_or_path, weights, config if own_code else None)
    _check_finite(model, str(name_or_path))
    return family(model if "device_map" in weights else model.to(place), texts)


@torch.inference_mode()
def _check_finite(model: Any, name: str) -> None:
    """Raise a ModelError for weights that are no numbers: the model would answer nothing, or anything."""
    for place, weight in model.named_parameters():
        if weight.is_meta or not weight.numel() or weight.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            continue
        least, most = weight.aminmax()
        if not (least.isfinite() and most.isfinite()):
            rule = f"the weights of {name} are not all finite: {place} holds NaN or infinity"
            raise ModelError(rule, "copy or download it again, or load it with another `dtype`")


def wrap_model(model: Any) -> VideoModel:
    """The adapter for a model that the user already holds; it takes ready-made inputs only."""
    return adapter_of(getattr(getattr(model, "config", None), "model_type", type(model).__name__))(model)


def _revision_of_own_code(name: str, revision: str | None, trust_remote_code: bool) -> str | None:
    """At which commit a known checkpoint's own code is run; the revision as it was given for all others."""
    owned = (known for family in FAMILIES.values() if family.own_code for known in family.checkpoints)
    checkpoint = next((known for known in owned if known.name == name), None)
    if checkpoint is None:
        return revision
    if not trust_remote_code:
        raise _untrusted(name)
    chosen = revision or checkpoint.revision
    if chosen is None:
        rule = f"{name} runs code of its own, and no commit of it is pinned here"
        raise ModelError(rule, "read its code, and name the commit with `revision`")
    return chosen


def _own_reference(source: str, hub: dict[str, Any]) -> tuple[Any, str] | None:
    """The family's file, and where the configuration's code lies, for families whose code comes with a checkpoint."""
    values = read_checkpoint_json(source, "config.json", **hub) or {}
    family = FAMILIES.get(values.get("model_type", ""))
    found: str | None = (values.get("auto_map") or {}).get("AutoConfig")
    return (import_module(family.module), found) if family and family.own_code and found else None


def _untrusted(name: str) -> ModelError:
    return ModelError(f"{name} brings code of its own", "set `trust_remote_code` to trust it")


def _read_config(source: str, name: str, trust_remote_code: bool, hub: dict[str, Any], away: str) -> Any:
    from transformers import AutoConfig, PreTrainedConfig

    try:
        check_config(name, PreTrainedConfig.get_config_dict(source, **hub)[0])
        if trust_remote_code and (own := _own_reference(source, hub)):
            return own[0].own_config(source, own[1], **hub)
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **hub)
    except MISFITS as error:
        reason = told(error)
        if "trust_remote_code" in str(error):
            raise _untrusted(name) from None
        if isinstance(error, (ImportError, AttributeError)) and trust_remote_code:
            hint = "install what it asks for, or the transformers that it was written for"
            raise ModelError(f"the code of {name} does not run here: {reason}", hint) from None
        if not isinstance(error, (OSError, ValueError, KeyError)):
            raise ModelError(f"config.json of {name} does not fit: {reason}", "get the checkpoint again") from None
        raise _unknown(name, away, reason) from None
    except ModelError as error:
        raise _unknown(name, away, "") if away else error from None


def _unknown(name: str, away: str, reason: str) -> ModelError:
    rule = f"{away}, and {name!r} is neither a folder nor in the hub's cache" if away else ""
    hint = f"give a folder, a hub id such as {FAMILIES['internvl'].checkpoints[0].name}, or demo"
    return ModelError(rule or f"unknown model {name!r}: {reason}", hint)


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not name.startswith(".")


def _read_texts(source: str, trust_remote_code: bool, hub: dict[str, Any], known: dict[str, Any]) -> Texts:
    from transformers import AutoTokenizer

    from statekv.models.checkpoint import read_processor_config
    from statekv.models.prompt import load_chat_template

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, **known, **hub)
    except Exception as error:  # of what is wrong in tokenizer.json the tokenizers package says no more than that
        if type(error) is not Exception and not isinstance(error, MISFITS):
            raise
        raise ModelError(f"no tokenizer in {source}: {told(error)}", "get the checkpoint again") from None
    if not isinstance(tokenizer.model_max_length, (int, float)):
        rule = f"the tokenizer's model_max_length is {tokenizer.model_max_length!r}, but must be a number"
        raise ModelError(rule, "get the checkpoint again")
    return Texts(tokenizer, load_chat_template(source, tokenizer, **hub), read_processor_config(source, **hub))


def _read_weights(source: str, name: str, settings: dict[str, Any], own_config: Any = None) -> Any:
    from transformers import AutoModelForImageTextToText

    try:
        stock: Any = AutoModelForImageTextToText
        if own_config is not None:
            family = import_module(FAMILIES[own_config.model_type].module)
            stock = family.own_model_class(source, own_config.auto_map["AutoModel"], revision=settings.get("revision"))
            settings = {**settings, "config": own_config, "attn_implementation": "sdpa"}
        loaded: Any = stock.from_pretrained(source, output_loading_info=True, **settings)
    except MISFITS as error:
        if any(words in str(error).lower() for words in ("out of memory", "allocate memory")):
            hint = "use a smaller model, a half `dtype` or a `device_map`"
            raise ModelError(f"{name} does not fit in memory", hint) from None
        hint = "check `dtype` and `device_map`, or get the weights again"
        raise ModelError(f"the weights of {name} do not load: {told(error)}", hint) from None
    model, report = loaded
    if report["missing_keys"]:
        # transformers would go on with random weights in their place.
        lost = sorted(report["missing_keys"])
        raise ModelError(f"the weights of {name} lack {len(lost)} tensors, such as {lost[0]}", "get them again")
    # It would leave out layers that the weights have.
    if spare := sorted(key for key in report["unexpected_keys"] if "language_model" in key and ".layers." in key):
        rule = f"the weights of {name} have {len(spare)} tensors that config.json has no layer for, such as {spare[0]}"
        raise ModelError(rule, "get config.json again")
    return model.eval()


def read_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """A dtype from its name; "auto" stays.

    Raises:
        ConfigError: an unknown one.
    """
    if isinstance(dtype, torch.dtype) or (isinstance(dtype, str) and dtype == "auto"):
        return dtype
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}", f"known: auto, {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def read_device(device: str | torch.device) -> torch.device:
    """A device that is there; "auto" takes CUDA where there is one, else the CPU.

    Raises:
        ConfigError: it is not there.
    """
    if not isinstance(device, (str, torch.device)):
        raise ConfigError(f"device is {device!r}, but must be a name", "use auto, cpu or cuda:0")
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device!r} is not to be had: {str(error).splitlines()[0]}", "use cpu") from None
    return found


_SAMPLED = 64  # elements of each tensor


@dataclass(frozen=True)
class Identity:
    """Which checkpoint a stream was computed with.

    Attributes:
        name: what `statekv.load` takes: a hub id, an absolute folder, or "demo"; empty for a model made in memory.
        revision: commit on the hub, where it came from there.
        kind: the configuration's `model_type`.
        dtype: of keys and values.
        weights: SHA-256 over names, shapes, dtypes and a sample of each tensor.
        texts: SHA-256 over the chat template and the video processor's recipe.
    """

    name: str
    revision: str | None
    kind: str
    dtype: str
    weights: str
    texts: str


def identify(model: VideoModel) -> Identity:
    """The checkpoint behind an adapter.

    64 elements of each tensor, spread evenly, are read: other training changes nearly all elements, and is seen. A
    change of a few elements between those is not; nor are weights that accelerate has moved to disk. Some quantised
    layers keep their codes in buffers, which count where a model says that it is quantised.
    """
    config = model.model.config
    name = str(getattr(config, "_name_or_path", "") or "")
    if name and Path(name).is_dir():
        name = "demo" if Path(name).resolve() == DEMO.resolve() else str(Path(name).resolve())
    revision = getattr(config, "_commit_hash", None)
    dtype = str(model.kv_spec().dtype).removeprefix("torch.")
    return Identity(name, revision, config.model_type, dtype, _weights(model.model), _texts(model))


def _weights(model: torch.nn.Module) -> str:
    found = hashlib.sha256()
    for name, weight in sorted(_tensors_of(model)):
        found.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if weight.device.type != "meta":
            flat = weight.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED].contiguous()
            found.update(bytes(sample.cpu().view(torch.uint8).tolist()))
    return found.hexdigest()


def _tensors_of(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    if getattr(model.config, "quantization_config", None) is not None:
        for prefix, module in model.named_modules():
            for name, buffer in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set:
                    yield f"{prefix}.{name}", buffer


def _texts(model: VideoModel) -> str:
    texts = model.texts
    said = "" if texts is None else f"{texts.chat_template}\n{sorted(texts.video_json.items())}"
    return hashlib.sha256(said.encode()).hexdigest()
