"""The paper's rows are found where model, task, method and budget are the paper's, and nowhere else."""

from __future__ import annotations

import pytest

from statekv.config import Config
from statekv.evals.paper import paper_share


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
    assert paper_share(task, model, Config.of(method)) == pytest.approx(share)


@pytest.mark.parametrize(
    ("task", "model", "config"),
    [
        ("cards", "OpenGVLab/InternVL3-1B-hf", Config.of("full")),
        ("ovo_backward", "OpenGVLab/InternVL3-1B-hf", Config.of("full")),
        ("videomme", "demo", Config.of("full")),
        ("videomme", "OpenGVLab/InternVL3-14B-hf", Config.of("full")),
        ("videomme", "Qwen/Qwen3-VL-8B-Thinking", Config.of("full")),
        ("videomme", "OpenGVLab/InternVL3-1B-hf", Config.of("statekv", budget=1024)),
        ("videomme", "OpenGVLab/InternVL3-1B-hf", Config.of("random")),
    ],
)
def test_what_the_paper_does_not_say(task: str, model: str, config: Config) -> None:
    assert paper_share(task, model, config) is None


def test_full_attention_has_no_budget() -> None:
    assert paper_share("mlvu", "Qwen/Qwen3-VL-2B-Instruct", Config.of("full", budget=7)) == pytest.approx(0.5883)
