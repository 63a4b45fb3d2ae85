# Shared by the scripts in this directory, which source it.

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
TORCH_TESTED=2.13.0

die() {
    echo "error: $*" >&2
    exit 2
}

# Sets PYTHON: the active environment's, else that of .venv, else the system's.
find_python() {
    if [[ -n ${VIRTUAL_ENV:-} || -n ${CONDA_PREFIX:-} ]] && command -v python >/dev/null; then
        PYTHON=python
    elif [[ -x $REPO/.venv/bin/python ]]; then
        PYTHON=$REPO/.venv/bin/python
    else
        PYTHON=$(command -v python3 || command -v python) || die "there is no Python: install Python 3.10 or newer"
    fi
    "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(not (u.find_spec("torch") and u.find_spec("huggingface_hub")))' ||
        die "$PYTHON lacks the packages of requirements.txt: run scripts/quickstart.sh, or pip install -r requirements.txt"
}

# Makes .venv where there is none, and activates it.
activate_venv() {
    local venv=$REPO/.venv base=
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
            if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
                base=$candidate
                break
            fi
        done
        [[ -n $base ]] || die "Python 3.10 or newer is needed, found $(python3 --version 2>&1 || true)"
        echo "making the virtual environment .venv with $("$base" --version)"
        "$base" -m venv --clear "$venv" >/dev/null ||
            die "$base cannot make a virtual environment: on Debian and Ubuntu, apt install python3-venv"
    fi
    export VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH
    unset PYTHONHOME
    PYTHON=$venv/bin/python
}

# install_requirements FILE: into .venv; instant when this has been done for the same files.
install_requirements() {
    local file=$1 stamp hash
    stamp=$VIRTUAL_ENV/.installed-$file
    hash=$(cd "$REPO" && cat requirements.txt "$file" | cksum)
    [[ -f $stamp && $(<"$stamp") == "$hash" ]] && return
    # Without --no-compile this takes twice as long; modules are compiled anyway when they are first imported.
    local pip=("$PYTHON" -m pip --disable-pip-version-check install --quiet --no-compile --use-pep517)
    if ! "$PYTHON" -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null &&
        [[ $(uname -s) == Linux ]] && ! nvidia-smi -L >/dev/null 2>&1; then
        # The Linux wheel of PyPI brings gigabytes of CUDA libraries, of no use here.
        echo "no NVIDIA GPU: installing the CPU build of torch"
        # The probe is quick to give up. It asks that index alone for a dependency of torch: pip's settings may name
        # others, and folders of wheels.
        if PIP_EXTRA_INDEX_URL=$TORCH_CPU_INDEX PIP_FIND_LINKS=$VIRTUAL_ENV "$PYTHON" -m pip --timeout 5 --retries 0 \
            index versions filelock --index-url $TORCH_CPU_INDEX &>/dev/null &&
            "${pip[@]}" --index-url $TORCH_CPU_INDEX "$(grep '^torch' "$REPO/requirements.txt")"
        then
            echo "torch comes from $TORCH_CPU_INDEX"
        else
            echo "$TORCH_CPU_INDEX cannot be reached: installing torch $TORCH_TESTED from pip's own index, CUDA or not"
            "${pip[@]}" torch==$TORCH_TESTED
        fi
    fi
    echo "installing $file"
    "${pip[@]}" -r "$REPO/$file"
    echo "$hash" >"$stamp"
}

# torch.compile builds its kernels with a C++ compiler and Python's headers.
can_compile() {
    command -v "${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || return 1
    "$PYTHON" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'
}
