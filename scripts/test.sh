#!/usr/bin/env bash
# Everything that must hold before a change is accepted: style, size, tests. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$REPO"

activate_venv
install_requirements requirements-dev.txt
can_compile || die "the tests need a C++ compiler and Python's headers: on Debian and Ubuntu, apt install g++ python3-dev"
./scripts/prepare.sh

ruff check .
ruff format --check .
echo "core: $(cat ./*.py | wc -l) of 3000 lines"
# Two workers with one thread each: the models are small, and most of the time is compilation.
OMP_NUM_THREADS=1 python -m pytest -n 2 "$@"
