"""The model `statekv` of lmms-eval, which finds it by the entry point `lmms_eval.models`."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What lmms-eval asks every package for that brings models: the model's name and its class."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="statekv", simple_class_path="statekv.evals.lmms_model.StateKV")
