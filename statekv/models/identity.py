"""What tells one checkpoint from another: its name, its family, and a sample of its weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from statekv.models.base import VideoModel
from statekv.models.loading import DEMO

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
    change of a few elements between those is not; nor are weights that accelerate has moved to disk.
    """
    config = model.model.config
    name = str(getattr(config, "_name_or_path", "") or "")
    if name and Path(name).is_dir():
        name = "demo" if Path(name).resolve() == DEMO.resolve() else str(Path(name).resolve())
    revision = getattr(config, "_commit_hash", None)
    dtype = str(model.geometry().dtype).removeprefix("torch.")
    return Identity(name, revision, config.model_type, dtype, _weights(model.model), _texts(model))


def _weights(model: torch.nn.Module) -> str:
    found = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        found.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if weight.device.type != "meta":
            flat = weight.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED].contiguous()
            found.update(bytes(sample.cpu().view(torch.uint8).tolist()))
    return found.hexdigest()


def _texts(model: VideoModel) -> str:
    texts = model.texts
    told = "" if texts is None else f"{texts.chat_template}\n{sorted(texts.video_json.items())}"
    return hashlib.sha256(told.encode()).hexdigest()
