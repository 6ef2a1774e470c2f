"""From a hub id, a folder or "demo" to a model with its texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from statekv.errors import ModelError
from statekv.models import FAMILIES, adapter
from statekv.models.base import Texts, VideoModel

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
        ModelError: not found, of an unsupported architecture, or not loadable, with the way out.
    """
    source = str(DEMO) if name_or_path == "demo" else name_or_path
    hub = {"revision": revision} if revision else {}
    config = _read_config(source, name_or_path, trust_remote_code, hub)
    family = adapter(config.model_type)
    texts = _read_texts(source, trust_remote_code, hub)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto" and device_map is None and torch.device(device).type == "cpu":
        dtype = torch.float32
    weights: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code, **hub}
    if device_map is not None:
        weights["device_map"] = device_map
    model = _read_weights(source, name_or_path, weights)
    return family(model if device_map is not None else model.to(device), texts)


def wrap_model(model: Any) -> VideoModel:
    """The adapter for a model that the user already holds; it takes ready-made inputs only."""
    return adapter(getattr(getattr(model, "config", None), "model_type", type(model).__name__))(model)


def _read_config(source: str, name: str, trust_remote_code: bool, hub: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **hub)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "trust_remote_code" in str(error):
            raise ModelError(f"{name} brings code of its own", "trust it with trust_remote_code=True") from None
        raise ModelError(
            f"unknown model {name!r}: {reason}",
            f"give a folder, a hub id such as {FAMILIES['internvl'].checkpoints[0]}, or demo",
        ) from None


def _read_texts(source: str, trust_remote_code: bool, hub: dict[str, Any]) -> Texts:
    from transformers import AutoTokenizer

    from statekv.models.checkpoint import read_processor_config
    from statekv.models.prompt import load_chat_template

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, **hub)
    except (OSError, ValueError) as error:
        raise ModelError(f"no tokenizer in {source}: {str(error).splitlines()[0]}", "download it again") from None
    return Texts(tokenizer, load_chat_template(source, tokenizer, **hub), read_processor_config(source, **hub))


def _read_weights(source: str, name: str, settings: dict[str, Any]) -> Any:
    try:
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText.from_pretrained(source, **settings).eval()
    except (ImportError, RuntimeError) as error:
        if _mentions_torchvision(error):
            raise ModelError(
                "the installed torchvision does not fit the installed torch, and transformers fails to import with it",
                "statekv does not need it: pip uninstall torchvision, or install the build that matches torch",
            ) from error
        if "out of memory" in str(error).lower() or "can't allocate memory" in str(error):
            raise ModelError(f"{name} does not fit in memory", "use a smaller model, a half dtype or a device_map") from None
        raise
    except (OSError, ValueError) as error:
        raise ModelError(f"the weights of {name} do not load: {str(error).splitlines()[0]}", "download them again") from None


def _mentions_torchvision(error: BaseException | None) -> bool:
    while error is not None:
        if "torchvision" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
