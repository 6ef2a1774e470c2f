"""From a hub id, a folder or "demo" to a model with its texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from statekv.errors import ConfigError, ModelError
from statekv.models import FAMILIES, adapter
from statekv.models.base import Texts, VideoModel

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

DEMO = Path(__file__).parent.parent / "checkpoints" / "demo"


def load_model(
    name_or_path: str,
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
        revision: branch, tag or commit on the hub.
        trust_remote_code: run code that comes with the checkpoint; off unless asked for.

    Raises:
        ConfigError: an unknown dtype, or a device that is not there.
        ModelError: not found, of an unsupported architecture, or not loadable, with the way out.
    """
    source = str(DEMO) if name_or_path == "demo" else name_or_path
    hub = {"revision": revision} if revision else {}
    config = _read_config(source, name_or_path, trust_remote_code, hub)
    family = adapter(config.model_type)
    texts = _read_texts(source, trust_remote_code, hub)
    dtype, place = read_dtype(dtype), read_device(device)
    if dtype == "auto" and device_map is None and place.type == "cpu":
        dtype = torch.float32
    weights: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code, **hub}
    if device_map is not None:
        weights["device_map"] = device_map
    model = _read_weights(source, name_or_path, weights)
    return family(model if device_map is not None else model.to(place), texts)


def wrap_model(model: Any) -> VideoModel:
    """The adapter for a model that the user already holds; it takes ready-made inputs only."""
    return adapter(getattr(getattr(model, "config", None), "model_type", type(model).__name__))(model)


def _read_config(source: str, name: str, trust_remote_code: bool, hub: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **hub)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        if "trust_remote_code" in str(error):
            raise ModelError(f"{name} brings code of its own", "trust it with trust_remote_code=True") from None
        raise ModelError(
            f"unknown model {name!r}: {reason}",
            f"give a folder, a hub id such as {FAMILIES['internvl'].checkpoints[0].name}, or demo",
        ) from None


def _read_texts(source: str, trust_remote_code: bool, hub: dict[str, Any]) -> Texts:
    from transformers import AutoTokenizer

    from statekv.models.checkpoint import read_processor_config
    from statekv.models.prompt import load_chat_template

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, **hub)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        told = str(error).strip() or type(error).__name__
        raise ModelError(f"no tokenizer in {source}: {told.splitlines()[0]}", "get the checkpoint again") from None
    return Texts(tokenizer, load_chat_template(source, tokenizer, **hub), read_processor_config(source, **hub))


def _read_weights(source: str, name: str, settings: dict[str, Any]) -> Any:
    from transformers import AutoModelForImageTextToText

    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(source, output_loading_info=True, **settings)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        told = str(error).strip() or type(error).__name__
        if "out of memory" in told.lower() or "allocate memory" in told.lower():
            hint = "use a smaller model, a half dtype or a device_map"
            raise ModelError(f"{name} does not fit in memory", hint) from None
        reason = told.splitlines()[0]
        hint = "check dtype and device_map, or get the weights again"
        raise ModelError(f"the weights of {name} do not load: {reason}", hint) from None
    model, report = loaded
    if report["missing_keys"]:
        # transformers would go on with random weights in their place.
        lost = sorted(report["missing_keys"])
        raise ModelError(f"the weights of {name} lack {len(lost)} tensors, such as {lost[0]}", "get them again")
    return model.eval()


def read_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """A dtype from its name; "auto" stays.

    Raises:
        ConfigError: an unknown one.
    """
    if dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in _DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}", f"known: auto, {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def read_device(device: str | torch.device) -> torch.device:
    """A device that is there; "auto" takes CUDA where there is one, else the CPU.

    Raises:
        ConfigError: it is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device!r} is not to be had: {str(error).splitlines()[0]}", "use cpu") from None
    return found
