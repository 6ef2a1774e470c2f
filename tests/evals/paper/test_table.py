"""The paper's figures stand beside runs that are the paper's, and beside no others."""

from __future__ import annotations

from typing import Any

import pytest

from statekv.config import Config
from statekv.evals.paper.table import paper_share

FRAMES: dict[str, Any] = {"fps": 1.0, "max_frames": 512}


@pytest.mark.parametrize(
    ("task", "model", "method", "share"),
    [
        ("videomme", "OpenGVLab/InternVL3-1B-hf", "full", 0.4619),
        ("mlvu", "OpenGVLab/InternVL3-2B-hf", "recency_window", 0.0549),
        ("ovo_realtime", "Qwen/Qwen3-VL-8B-Instruct", "statekv", 0.6499),
        ("mlvu", "/models/Qwen3-VL-4B-Instruct/", "statekv", 0.6780),
        ("videomme", "nvidia/Eagle2.5-8B", "statekv", 0.6796),
    ],
)
def test_rows_of_the_paper(task: str, model: str, method: str, share: float) -> None:
    assert paper_share(task, model, Config.of(method, **FRAMES)) == pytest.approx(share)


@pytest.mark.parametrize(
    ("task", "model", "config"),
    [
        ("cards", "OpenGVLab/InternVL3-1B-hf", Config.of("full", **FRAMES)),
        ("ovo_backward", "OpenGVLab/InternVL3-1B-hf", Config.of("full", **FRAMES)),
        ("videomme", "demo", Config.of("full", **FRAMES)),
        ("videomme", "OpenGVLab/InternVL3-14B-hf", Config.of("full", **FRAMES)),
        ("videomme", "Qwen/Qwen3-VL-8B-Thinking", Config.of("full", **FRAMES)),
        ("videomme", "OpenGVLab/InternVL3-1B-hf", Config.of("statekv", budget=1024, **FRAMES)),
        ("videomme", "OpenGVLab/InternVL3-1B-hf", Config.of("random", **FRAMES)),
        ("videomme", "OpenGVLab/InternVL3-1B-hf", Config.of("full", fps=0.5, max_frames=512)),
        ("videomme", "OpenGVLab/InternVL3-1B-hf", Config.of("full", fps=1.0, max_frames=64)),
    ],
)
def test_what_the_paper_does_not_say(task: str, model: str, config: Config) -> None:
    assert paper_share(task, model, config) is None


def test_full_attention_has_no_budget() -> None:
    assert paper_share("mlvu", "Qwen/Qwen3-VL-2B-Instruct", Config.of("full", seed=7, **FRAMES)) == pytest.approx(
        0.5883
    )
