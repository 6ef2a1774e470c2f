"""Files of a checkpoint: texts, on the hub or in a folder, read as the stock classes search for them; what weights are
there, without loading them.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from huggingface_hub import constants
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers.utils.hub import cached_file

from statekv.errors import ModelError
from statekv.models import FAMILIES

_PATIENCE_SECONDS = 3.0

# What transformers, tokenizers, safetensors and torch raise over files whose parts do not fit together.
MISFITS: tuple[type[Exception], ...] = (
    *(OSError, ImportError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError),
    *(RuntimeError, SafetensorError, StrictDataclassError),
)
_MOST_LAYERS, _MOST = 1000, 2**31  # no checkpoint has more, and what is built before it is noticed takes all memory
_LAYERS = ("num_hidden_layers", "num_layers", "depth")


def why_hub_is_away() -> str:
    """Why the hub cannot be asked; empty where it can.

    The hub's own client tries five times, for half a minute in all and for each file anew.
    """
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=_PATIENCE_SECONDS).close()
    except HTTPError:
        return ""  # it answers
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        return f"cannot reach the hub at {constants.ENDPOINT}: {getattr(reason, 'strerror', None) or reason}"
    return ""


def told(error: Exception) -> str:
    """What the libraries say of a misfit, in one line; of a configuration's field the line that says why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    chosen = lines[1] if isinstance(error, StrictDataclassError) and len(lines) > 1 else lines[0]
    return chosen.removeprefix("TypeError: ").removeprefix("ValueError: ").rstrip(".")[:300]


def check_config(name: str, values: dict[str, Any]) -> None:
    """Raise a ModelError for what no configuration of a supported family says, before something is built by it."""
    _check_numbers(name, values)
    kind = values.get("model_type")
    for part in ("text_config", "vision_config") if isinstance(kind, str) and kind in FAMILIES else ():
        found = values.get(part)
        if not isinstance(found, dict) or not found:  # transformers would build a large one by its defaults
            raise ModelError(f"config.json of {name} has no {part}", "get the checkpoint again")


def _check_numbers(name: str, values: Any, place: str = "config.json") -> None:
    inner = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in inner:
        here = f"{place}, {key}" if isinstance(key, str) else place
        _check_numbers(name, value, here)
        if isinstance(value, float) and not math.isfinite(value):
            raise ModelError(f"{here} of {name} is {value}, but must be finite", "get the checkpoint again")
        most = _MOST_LAYERS if key in _LAYERS else _MOST
        if isinstance(value, int) and abs(value) > most:
            raise ModelError(f"{here} of {name} is {value:.6g}, but at most {most} makes sense", "get it again")


def read_processor_config(name_or_path: str, **hub_kwargs: Any) -> dict[str, Any]:
    """The video processor's JSON of a checkpoint, searched for in the order of the stock classes.

    Args:
        name_or_path: a hub id or a folder.
        hub_kwargs: as for `transformers.utils.cached_file` (revision, token, cache_dir, local_files_only …).

    Raises:
        ModelError: no such checkpoint, or none of the three files.
    """
    nested = read_checkpoint_json(name_or_path, "processor_config.json", **hub_kwargs) or {}
    if "video_processor" in nested:
        return dict(nested["video_processor"])
    for filename in ("video_preprocessor_config.json", "preprocessor_config.json"):
        found = read_checkpoint_json(name_or_path, filename, **hub_kwargs)
        if found is not None:
            return found
    names = "processor_config.json, video_preprocessor_config.json or preprocessor_config.json"
    hint = "check the name; a checkpoint in the Hugging Face layout is needed, often named …-hf"
    raise ModelError(f"no {names} in {name_or_path}", hint)


def read_checkpoint_json(name_or_path: str, filename: str, **hub_kwargs: Any) -> dict[str, Any] | None:
    """One JSON object of a checkpoint, or None where the checkpoint has no such file."""
    text = read_checkpoint_file(name_or_path, filename, **hub_kwargs)
    if text is None:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ModelError(f"{filename} of {name_or_path} is no JSON object", "download it again")
    return found


def read_checkpoint_file(name_or_path: str, filename: str, **hub_kwargs: Any) -> str | None:
    """One text file of a checkpoint, or None where the checkpoint has no such file."""
    try:
        path = cached_file(name_or_path, filename, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
    except OSError as error:
        rule = f"cannot read {name_or_path}: {str(error).splitlines()[0]}"
        raise ModelError(rule, "check the name, the folder or the network") from error
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError):
        raise ModelError(f"{filename} of {name_or_path} is no text in UTF-8", "download it again") from None


@dataclass(frozen=True)
class Weights:
    """What the files of weights in a folder say of themselves.

    Attributes:
        files: how many there are.
        elements: of all tensors, by dtype.
    """

    files: int
    elements: Mapping[str, int]

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(self.elements.values())


_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_SHORT = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
_POINTER = b"version https://git-lfs"


def look_at_weights(folder: Path) -> Weights:
    """Read the headers of all files of weights in a folder: whether they are all there, and whole.

    Raises:
        ModelError: none there, one that is missing or cut off, or one that lacks a tensor of the index.
    """
    index = read_checkpoint_json(str(folder), _INDEX) or {}
    wanted: Mapping[str, str] = index.get("weight_map") or {"": _SINGLE}
    names = sorted(set(wanted.values()))
    if lost := [name for name in names if not (folder / name).is_file()]:
        rule = f"{folder} lacks {len(lost)} of {len(names)} files of weights, such as {lost[0]}"
        raise ModelError(rule, "download them; weights are read as safetensors")
    elements: Counter[str] = Counter()
    there: set[str] = {""}
    for name in names:
        for tensor, (dtype, count) in _header(folder / name).items():
            elements[dtype] += count
            there.add(tensor)
    if lost := sorted(set(wanted) - there):
        raise ModelError(f"the weights in {folder} lack {len(lost)} tensors, such as {lost[0]}", "download them again")
    return Weights(len(names), dict(elements))


def _header(file: Path) -> dict[str, tuple[str, int]]:
    """Of each tensor in a file, the dtype and the number of its elements."""
    with file.open("rb") as opened:
        if opened.read(len(_POINTER)) == _POINTER:
            raise ModelError(f"{file} is a pointer of git-lfs, not the weights", "run git lfs pull, or download it")
    try:
        with safe_open(file, "pt") as tensors:  # type: ignore[no-untyped-call]
            parts = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            return {
                name: (_SHORT.get(part.get_dtype(), part.get_dtype()), math.prod(part.get_shape()))
                for name, part in parts.items()
            }
    except SafetensorError as error:
        raise ModelError(f"{file} is cut off, or no safetensors: {told(error)}", "download it again") from None
