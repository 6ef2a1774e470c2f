#!/usr/bin/env bash
# Tests and benchmarks that need a GPU, within 8 minutes on an H100: rows into benchmarks/results, pictures beside them.
#
#   make test            # once: sets up .venv
#   benchmarks/gpu.sh [PEER.py]
#
# PEER.py holds a function flash_attn_with_key_scores to be timed beside ours, such as the public release's
# lmms_eval/models/model_utils/triton_attn_scores.py.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=.venv/bin
peer=()
if [ $# -gt 0 ]; then peer=(--peer "$1"); fi

# Correctness first: the kernel compiled, CUDA graphs, the flash kernel of answers. A skip is a failure here.
STATEKV_REQUIRE=gpu timeout 180 "$bin/python" -m pytest -q -m gpu tests

timeout 90 "$bin/statekv" bench attention --budgets 1024,4096 "${peer[@]}"
for model in internvl3-2b internvl3-8b qwen3-vl-8b; do
    timeout 60 "$bin/statekv" bench prefill --models "$model" --budgets 4096 --steps 1,64,1024,3600
done
timeout 60 "$bin/statekv" bench prefill --models internvl3-1b --budgets 4096 --steps 1,64,1024,3600 --plain
timeout 60 "$bin/statekv" bench sessions --models internvl3-1b,internvl3-8b --budget 4096 --seconds 5
timeout 60 "$bin/statekv" bench answer --models internvl3-8b
timeout 30 "$bin/statekv" bench memory --models internvl3-8b
