#!/usr/bin/env bash
# From a fresh clone to text: environment, default model, compiled generation. Arguments go to generate.py:
#
#   ./scripts/quickstart.sh
#   ./scripts/quickstart.sh --prompt "Why is the sky blue?" --max_new_tokens 100
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

activate_venv
install_requirements requirements.txt
"$REPO/scripts/prepare.sh"

compile=(--compile)
if ! can_compile; then
    echo "no C++ compiler with Python's headers found: running without --compile, which is slower" >&2
    echo "(on Debian and Ubuntu: apt install g++ python3-dev; on macOS: xcode-select --install)" >&2
    compile=()
fi
"$PYTHON" "$REPO/generate.py" --checkpoint_path "$REPO/checkpoints/SmolLM2-135M-Instruct/model.pth" \
    ${compile[@]+"${compile[@]}"} --stream --chat --prompt "Explain in three sentences why the sky is blue." "$@"
