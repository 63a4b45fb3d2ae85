#!/usr/bin/env bash
# The README's CPU figures: SmolLM2 decoding with --compile, one and two threads, into benchmarks/cpu_*.json.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
find_python
cd "$REPO"
for threads in 1 2; do
    for precision in bf16 fp32; do
        OMP_NUM_THREADS=$threads "$PYTHON" scripts/bench.py --device cpu --precision $precision --max_new_tokens 100 \
            --checkpoint_path checkpoints/SmolLM2-135M-Instruct/model.pth --json benchmarks/cpu_${precision}_$threads.json
    done
done
