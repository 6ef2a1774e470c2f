"""Which faults `tests.mutants` tries beside those that it makes, which tests it asks, and what means nothing."""

from __future__ import annotations

# Faults that were found by other means: file, text that is there once, what reads otherwise.
NAMED: tuple[tuple[str, str, str], ...] = (
    ("cache/policies/recent.py", "candidates.token_ids.double()", "candidates.token_ids.float()"),
    ("video/clock.py", "advance < 0 or", "advance <= 0 or"),
    ("video/sampling.py", "min(_SLACK_SECONDS * rate, _SLACK_CELLS)", "_SLACK_SECONDS * rate"),
    (
        "cache/folder.py",
        "os.replace(unfinished, target / FACTS)",
        "(target / FACTS).write_bytes(unfinished.read_bytes())",
    ),
    ("cache/folder.py", "        file.flush()\n        os.fsync(file.fileno())\n", ""),
    ("cache/folder.py", '    with path.open("rb+") as file:\n        os.fsync(file.fileno())\n', ""),
    ("cache/folder.py", "    _sync(target)\n    os.replace", "    os.replace"),
    ("cache/folder.py", "target / FACTS)\n    _sync(target)\n", "target / FACTS)\n"),
    ("cache/tiers/disk.py", "        with self._writing:\n", "        if self._writing:\n"),
    ("cache/tiers/disk.py", "if _locked(lock) and os.fstat(lock).st_nlink:", "if os.fstat(lock).st_nlink:"),
    (
        "cache/tiers/disk.py",
        "if stat.S_ISREG(os.fstat(lock).st_mode) and _locked(lock):",
        "if stat.S_ISREG(os.fstat(lock).st_mode):",
    ),
    ("cache/batched.py", "torch.stack(newest)", "torch.stack([newest[0]] * len(newest))"),
    ("runner/batching.py", "horizon, state.pinned, state", "horizon, state"),
    ("runner/decoding.py", "logits.to(torch.float32, copy=True)", "logits.to(torch.float32).half()"),
    ("runner/decoding.py", "shares = scores.softmax(-1)", "shares = scores.bfloat16().softmax(-1)"),
    ("runner/cuda_graph.py", "step is None or step.addresses != addresses", "step is None"),
    ("cache/carried.py", "rotate(keys.float(), cos, sin)", "rotate(keys.bfloat16(), cos.bfloat16(), sin.bfloat16())"),
    ("cache/carried.py", "rotate(keys.float(), cos, sin)", "rotate(keys, cos.to(keys), sin.to(keys))"),
    (
        "cache/detailed.py",
        "rotate(keys.float(), cos.to(keys.device)[:, None], sin.to(keys.device)",
        "rotate(keys, cos.to(keys)[:, None], sin.to(keys)",
    ),
    (
        "cache/tiers/fetch.py",
        "rotate(held[0].float(), cos.to(held.device)[:, None], sin.to(held.device)",
        "rotate(held[0], cos.to(held)[:, None], sin.to(held)",
    ),
    (
        "cache/retrieval.py",
        "rotate(keys.float(), cos[:, None], sin[:, None]).to(keys.dtype)",
        "rotate(keys, cos[:, None].to(keys), sin[:, None].to(keys))",
    ),
    ("engine/ingest.py", "if self.waiting else step.frames[:-1]", "if self.waiting else []"),
    ("engine/session.py", "            self.runner.admission.leave(self.state)\n", ""),
)

_OF_POLICIES = (
    *("cache/test_carry.py", "cache/policies", "cache/test_carried.py"),
    "method/test_policies.py::test_a_policy_equals_the_layer_loop_by_hand",
    "method/test_policies.py::test_a_dial_equals_the_layer_loop_by_hand",
)
# Tests that hold what a file does and stand elsewhere, by the beginning of its path.
BESIDE: dict[str, tuple[str, ...]] = {
    "cache/archive.py": ("cache/tiers/test_tiers_saving.py", "engine/test_snapshot.py"),
    "cache/batched.py": ("runner/test_batching.py", "runner/test_cuda_graph.py"),
    "cache/carried.py": (*_OF_POLICIES, "method/test_method.py"),
    "cache/carry.py": _OF_POLICIES,
    "cache/compaction.py": ("method/test_positions.py",),
    "cache/detailed.py": ("method/test_baselines.py",),
    "cache/folder.py": ("cache/test_archive.py",),
    "cache/policies": _OF_POLICIES,
    "cache/retrieval.py": ("method/test_retrieve.py",),
    "cache/stream.py": ("runner/test_runner.py", "method/test_baselines.py", "method/test_positions.py"),
    "cache/tiers": ("cache/tiers/test_tiers.py", "cache/tiers/test_tiers_saving.py"),
    "cache/view.py": ("cache/test_stream.py",),
    "engine/ingest.py": ("engine/test_session.py",),
    "engine/session.py": ("runner/test_memory.py",),
    "runner/runner.py": ("runner/test_batching.py", "method/test_reduce.py"),
}

_PACE = "how much is done at once, not what"
_OVERWRITTEN = "what it writes too much is written over"
_SAME_AXIS = "all have as many axes"

# What changes nothing wherever it comes to be: who is told in a warning, and a check that never fails.
SILENT = ("stacklevel=3", "SpeedWarning, 3)", "strict=False")

# Changes that nothing could tell from the code as it is: file and the line as it reads then, and why.
EQUIVALENT: dict[tuple[str, str], str] = {
    ("cache/batched.py", "tensor[row : row + 2, :, :length] = member.state[layer][name][..., :length]"): _OVERWRITTEN,
    ("cache/batched.py", "return self._firsts[device] + torch.arange(key.shape[(2)], device=device)"): _SAME_AXIS,
    ("cache/detailed.py", "_FIRST_CAPACITY = 257  # tokens"): _PACE,
    ("cache/folder.py", "_CHUNK = 2 << 20  # bytes"): _PACE,
    ("cache/retrieval.py", "_MOVED_AT_ONCE = 513  # blocks"): _PACE,
    (
        "runner/batching.py",
        "return config, horizon, state.pinned, (state.config.memory is None), tuple(carried.lengths)",
    ): "a key tells as much",
    ("ops/triton.py", "128: ((128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 5, 3), _SMALL),"): _PACE,
    ("ops/triton.py", "128: ((64, 128, 8, 3), (128, 128, 8, 2), (64, 64, 5, 3), _SMALL),"): _PACE,
    ("ops/triton.py", "if (FIRST + WIDTH >= DIM):"): "a mask that lets everything through",
    ("ops/triton.py", "if TAIL > 1:"): "a tail is 0 or 16 and more",
    (
        "ops/triton.py",
        "one = tl.load(partial_denominators + tl.cast(part, tl.int64) * pairs * queries * GROUP + place, present, 1.0)",
    ): "rows that are absent are not stored",
}
