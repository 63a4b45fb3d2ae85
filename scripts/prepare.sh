#!/usr/bin/env bash
# Download a model, convert it to model.pth and quantise it to model_int8.pth, skipping what is done already.
#
#   ./scripts/prepare.sh                                    the default model, which needs no account
#   ./scripts/prepare.sh gemma-3-270m                       another one that needs none
#   ./scripts/prepare.sh meta-llama/Llama-2-7b-chat-hf      from the Hugging Face hub (HF_TOKEN where it is gated)
#   ./scripts/prepare.sh path/to/directory                  a directory that has the weights already
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[[ $# -le 1 ]] || die "usage: scripts/prepare.sh [MODEL_REPO or directory], got $# arguments"
MODEL_REPO=${1:-SmolLM2-135M-Instruct}
find_python

if [[ -d $MODEL_REPO ]]; then
    directory=${MODEL_REPO%/}
else
    directory=$REPO/checkpoints/$MODEL_REPO
    "$PYTHON" "$REPO/scripts/download.py" --repo_id "$MODEL_REPO" --checkpoints_dir "$REPO/checkpoints"
fi

# newer FILE SOURCE...: FILE exists and none of its sources is newer
newer() {
    local file=$1 source
    shift
    [[ -f $file ]] || return 1
    for source in "$@"; do
        [[ -e $source && $source -nt $file ]] && return 1
    done
    return 0
}

if newer "$directory/model.pth" "$directory"/{*.safetensors,pytorch_model*.bin,consolidated.*.pth,original/consolidated.*.pth,stories*.pt,*.gguf}; then
    echo "$directory/model.pth is up to date"
elif [[ $MODEL_REPO == SmolLM2-135M-Instruct ]]; then # in full precision, to be quantised in all ways
    "$PYTHON" "$REPO/scripts/convert_hf_checkpoint.py" --checkpoint_dir "$directory" --dtype bf16
else
    "$PYTHON" "$REPO/scripts/convert_hf_checkpoint.py" --checkpoint_dir "$directory"
fi

# quantised FILE: its linear layers are in 8 bits or less
quantised() {
    "$PYTHON" -c 'import sys, torch; sys.exit(all(t.dtype.itemsize > 1 for t in torch.load(sys.argv[1], mmap=True).values()))' "$1"
}

if quantised "$directory/model.pth"; then
    echo "$directory/model.pth is quantised, as its source is"
elif newer "$directory/model_int8.pth" "$directory/model.pth"; then
    echo "$directory/model_int8.pth is up to date"
else
    "$PYTHON" "$REPO/quantize.py" --checkpoint_path "$directory/model.pth" --mode int8
fi
