#!/usr/bin/env bash
# Packing at Qwen3-8B's shape, random NF4 weights, and the tests that need a GPU: under ten minutes on one card; figures in
# gpu.json. Without a GPU the same at a small shape. PYTHON=.venv/bin/python benchmarks/gpu.sh [flags of packing.py]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
model=$($python -c 'import torch; print("qwen3-8b" if torch.cuda.is_available() else "tiny")')
dialogues=$([ "$model" = tiny ] && echo 2 || echo 6)
$python benchmarks/packing.py --train_file data/demo/train.json --label_guide data/demo/label_guide.yaml --model "$model" \
    --num_dialogues "$dialogues" --windows "stride 10" --batch_sizes 4 --repeats 2 --output gpu.json "$@"
$python -m pytest -q -m gpu tests
