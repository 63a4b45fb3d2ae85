#!/usr/bin/env bash
# The CPU figures of benchmarks/README.md: SmolLM2 decoding with --compile, one and two threads, into benchmarks/cpu_*.json.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
find_python
cd "$REPO"
folder=checkpoints/SmolLM2-135M-Instruct
"$PYTHON" quantize.py --checkpoint_path $folder/model.pth --mode int8
"$PYTHON" quantize.py --checkpoint_path $folder/model.pth --mode int4
measure() { # name, precision, file
    OMP_NUM_THREADS=$threads "$PYTHON" scripts/bench.py --device cpu --precision "$2" --max_new_tokens 100 \
        --checkpoint_path "$folder/$3" --json "benchmarks/cpu_$1_$threads.json"
}
for threads in 1 2; do
    measure bf16 bf16 model.pth
    measure fp32 fp32 model.pth
    measure int8 bf16 model_int8.pth
    measure int4 bf16 model_int4.g32.pth
done
