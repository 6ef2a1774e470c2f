"""Candidates run side by side on small shapes, and those that cannot say why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from statekv.bench import attention
from statekv.bench.attention import STOCK, Shape, load_peer, measure, panels, shapes
from statekv.bench.harness import Row
from statekv.bench.models import SIZES
from statekv.errors import ConfigError, MemoryLimitError
from statekv.ops import IMPLEMENTATIONS
from statekv.ops.reference import attention_with_key_scores

CPU = torch.device("cpu")
SMALL = Shape("small", heads=4, kv_heads=2, head_dim=16, budget=24, queries=8)


def rows_by_subject(shape: Shape = SMALL, **settings) -> dict[str, Row]:
    rows = measure(shape, device=CPU, dtype=torch.float32, runs=3, rate=1e9, **settings)
    return {row.subject: row for row in rows}


def test_every_implementation_is_measured_beside_stock() -> None:
    found = rows_by_subject()
    assert list(found) == [STOCK, *IMPLEMENTATIONS]
    for name in {STOCK, *IMPLEMENTATIONS} - {"triton"}:
        assert len(found[name].samples) == 3
        assert found[name].remark == ""
        assert found[name].reference == found[STOCK].median
        assert found[name].floor == pytest.approx(1000 * SMALL.flops / 1e9)
    assert found[STOCK].ratio == 1


def test_the_floor_counts_the_pairs_that_see_each_other() -> None:
    visible = torch.ones(SMALL.queries, SMALL.keys).tril(SMALL.budget)
    assert SMALL.pairs == int(visible.sum())
    assert SMALL.flops == 2 * 2 * 4 * 16 * SMALL.pairs


def test_models_whose_layers_look_alike_are_measured_once() -> None:
    found = shapes(SIZES, [256, 1024], 256)
    assert sum(len(shape.models.split()) for shape in found) == 2 * len(SIZES)
    assert len({(shape.heads, shape.kv_heads, shape.head_dim, shape.budget) for shape in found}) == len(found)
    alike = {"internvl3-8b", "eagle2.5-8b", "qwen2.5-vl-7b", "llava-onevision-7b"}
    assert alike in [set(shape.models.split()) for shape in found]


def test_an_unknown_model_is_named() -> None:
    with pytest.raises(ConfigError, match="unknown model 'gpt'"):
        shapes(["gpt"], [256], 256)


def test_what_needs_a_gpu_or_too_much_memory_is_left_out_aloud(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "IMPLEMENTATIONS", {"naive": None, "triton": None})
    monkeypatch.setattr(attention, "_NAIVE_BYTES", 1 << 10)
    found = rows_by_subject()
    assert found["naive"].samples == found["triton"].samples == ()
    assert "left out: a matrix of all heads" in found["naive"].remark
    assert found["triton"].remark == "left out: needs CUDA"


def test_a_peer_runs_beside_the_others() -> None:
    def peer(query, key, value, scale):
        mixed, scores = attention_with_key_scores(query, key, value, scale=scale)
        return mixed, scores.repeat_interleave(2, 1)

    found = rows_by_subject(peer=peer)["peer"]
    assert len(found.samples) == 3
    assert found.remark == ""


def _refuse(*_):
    raise ValueError("requires CUDA tensors\nand more")


@pytest.mark.parametrize(
    ("peer", "remark"),
    [
        (_refuse, "left out: ValueError: requires CUDA tensors"),
        (lambda query, *_: (2 * query, None), "away from sdpa's"),
        (lambda query, *_: (query * torch.nan, None), "away from sdpa's"),
        (lambda query, *_: (query[:, 1:], None), "does not return values [1, 4, 8, 16]"),
        (lambda *_: None, "does not return values"),
    ],
)
def test_a_peer_that_fails_or_errs_is_not_timed(peer, remark: str) -> None:
    found = rows_by_subject(peer=peer)
    assert found["peer"].samples == ()
    assert remark in found["peer"].remark
    assert len(found["blocked"].samples) == 3


def test_keys_that_do_not_fit_are_refused() -> None:
    huge = Shape("huge", heads=4, kv_heads=2, head_dim=128, budget=1 << 40)
    with pytest.raises(MemoryLimitError, match="keys and values of 1099511628032 tokens"):
        rows_by_subject(huge)


def test_a_panel_per_shape_of_heads_with_the_floor() -> None:
    other = Shape("small", heads=4, kv_heads=2, head_dim=16, budget=48, queries=8)
    rows = [*rows_by_subject().values(), *rows_by_subject(other).values()]
    (panel,) = panels(rows)
    assert [budget for budget, _ in panel.lines["floor"]] == [24, 48]
    assert {STOCK, "floor", "naive", "blocked"} <= set(panel.lines)
    assert panel.lines["blocked"][1] == (48, rows[[r.subject for r in rows].index("blocked", len(rows) // 2)].median)


ECHO = """
def flash_attn_with_key_scores(q, k, v, sm_scale=None, causal=True, cache_len=0):
    return q * sm_scale, (k.shape[2], v.shape[2], causal, cache_len)
"""


def test_the_function_is_called_as_the_release_defines_it(tmp_path: Path) -> None:
    (tmp_path / "peer.py").write_text(ECHO)
    query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 10, 8)
    mixed, told = load_peer(tmp_path / "peer.py")(query, key, key, 0.5)
    assert torch.equal(mixed, query * 0.5)
    assert told == (10, 10, True, 7)


@pytest.mark.parametrize(
    ("name", "text", "rule"),
    [
        ("missing.py", None, "is not a file"),
        ("peer.txt", ECHO, "is not Python"),
        ("empty.py", "", "has no function flash_attn_with_key_scores"),
        ("number.py", "flash_attn_with_key_scores = 3", "has no function"),
        ("syntax.py", "def flash_attn_with_key_scores(:", "does not run: SyntaxError"),
        ("import.py", "import a_module_that_nobody_has", "does not run: ModuleNotFoundError"),
        ("exit.py", "raise RuntimeError('first\\nsecond')", "does not run: RuntimeError: first"),
        ("bytes.py", b"\xff\xfe\x00", "does not run"),
    ],
)
def test_a_file_that_is_no_peer(tmp_path: Path, name: str, text: str | bytes | None, rule: str) -> None:
    if text is not None:
        (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError) as caught:
        load_peer(tmp_path / name)
    assert name in str(caught.value)
    assert rule in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_peer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a file"):
        load_peer(tmp_path)
