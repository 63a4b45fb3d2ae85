#!/usr/bin/env bash
# Everything that must hold before a change is accepted: style, size, tests. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$REPO"
LIMIT=3713 # lines of Python at the top level, which an evening has to be enough for

unset PYTHONDONTWRITEBYTECODE # as images of Python set: each of a hundred processes would compile PyTorch's modules anew
activate_venv
install_requirements requirements-dev.txt
can_compile || die "the tests need a C++ compiler and Python's headers: on Debian and Ubuntu, apt install g++ python3-dev"
./scripts/prepare.sh

ruff check .
ruff format --check .
lines=$(cat ./*.py | wc -l)
echo "top-level Python: $lines of $LIMIT lines; ops/: $(cat ops/*.py ops/*.cpp | wc -l), formats/: $(cat formats/*.py | wc -l), process/: $(cat process/*.py | wc -l)," \
    "scripts/: $(cat scripts/*.* | wc -l), tests/: $(cat tests/*.py | wc -l)"
((lines <= LIMIT)) || die "the top level has grown beyond its limit: look for the simpler design"
# Two workers with one thread each: the models are small, and most of the time is compilation.
# Each begins with a half of the files, so that what a file's tests share is made once, and takes from the other's rest.
OMP_NUM_THREADS=1 python -m pytest -n 2 --dist worksteal "$@"
