"""The library of a CPU's kernels: compiled when a model is first loaded there, loaded by ctypes.

cpu.cpp is threads and sampling. cpu_kernels.cpp is compiled once for each instruction set of the architecture, and
`library` uses the best of them that this processor runs, or the one that the environment variable GPTFAST_CPU names
("none": plain PyTorch serves).
"""

import ctypes
import functools
import hashlib
import math
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

from errors import UserError

HERE = Path(__file__).parent
SOURCES = ("cpu.h", "cpu.cpp", "cpu_kernels.cpp")
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wno-psabi")
FLAGS += ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-ffp-contract=fast")
AVX2 = ("-mavx2", "-mfma")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
X86 = {"generic": (), "avx2": AVX2, "avxvnni": (*AVX2, "-mavxvnni"), "avx512": AVX512}
X86["avx512vnni"] = (*AVX512, "-mavx512vnni")
X86["avx512bf16"] = (*X86["avx512vnni"], "-mavx512bf16")
ARM = {"generic": (), "dotprod": ("-march=armv8.2-a+dotprod",)}
SETS = {"x86_64": X86, "AMD64": X86, "aarch64": ARM, "arm64": ARM}.get(platform.machine(), {"generic": ()})


class Linear(Structure):
    """As in cpu.h, like the others."""

    _fields_ = [(name, c_void_p) for name in ("weight", "scales", "zeros", "bias")]
    _fields_ += [(name, c_int64) for name in ("N", "K", "padded")]
    _fields_ += [(name, c_int32) for name in ("kind", "group", "fp16", "parts", "swiglu", "half")]


class Product(Structure):
    _fields_ = [("layer", POINTER(Linear))] + [(name, c_void_p) for name in ("x", "norm", "residual", "y")]
    _fields_ += [("M", c_int64), ("eps", c_float), ("half_x", c_int32), ("half_y", c_int32)]


class Attention(Structure):
    _fields_ = [
        (name, c_void_p) for name in ("qkv", "k", "v", "y", "k_scales", "v_scales", "pos", "rope", "q_norm", "k_norm")
    ]
    _fields_ += [(name, c_int64) for name in ("B", "S", "T", "H", "Hkv", "D", "of_row", "of_head")]
    _fields_ += [(name, c_int64) for name in ("scales_of_row", "scales_of_head", "turns", "rotary", "window")]
    _fields_ += [("eps", c_float)] + [(name, c_int32) for name in ("kind", "half_x", "half_norm")]


class Layer(Structure):
    _fields_ = [(name, Linear) for name in ("wqkv", "wo", "w13", "w2")]
    _fields_ += [(name, c_void_p) for name in ("attention_norm", "ffn_norm", "q_norm", "k_norm")]
    _fields_ += [(name, c_float) for name in ("attention_eps", "ffn_eps", "head_eps")]
    _fields_ += [(name, c_int32) for name in ("window", "rotates")]


class Step(Structure):
    _fields_ = [("layers", POINTER(Layer)), ("caches", POINTER(c_void_p)), ("x", c_void_p), ("y", c_void_p)]
    _fields_ += [("n_layer", c_int64), ("C", c_int64), ("half", c_int32), ("attention", Attention)]


ARGUMENTS = {  # of what cpu.cpp exports
    "gptfast_runs": (c_char_p,),
    "gptfast_use": (c_void_p,),
    "gptfast_linear": (POINTER(Product), c_int32),
    "gptfast_attention": (POINTER(Attention), c_int32),
    "gptfast_step": (POINTER(Step), c_int32),
    "gptfast_sample": (c_void_p, c_int64, c_int64, c_float, c_int64, c_float, c_void_p, c_void_p),
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, with `name` and `lanes` of the kernels in use and the names of `sets` that run here, or None where
    it cannot be compiled or is not wanted. The first call on a machine compiles it, in some 10 s, for all later ones.
    Raises UserError for an instruction set that is not known or does not run here."""
    wanted = os.environ.get("GPTFAST_CPU", "")
    if wanted == "none":
        return None
    try:
        lib = ctypes.CDLL(str(_build()))
    except (OSError, ValueError, subprocess.CalledProcessError) as error:  # no home, odd quotes in CXX
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        print(f"plain PyTorch serves: the CPU kernels cannot be compiled ({reason})", file=sys.stderr)
        return None
    for name, types in ARGUMENTS.items():
        getattr(lib, name).argtypes = types
    sets = [name for name in SETS if hasattr(lib, f"gptfast_{name}") and lib.gptfast_runs(name.encode())]
    if wanted and wanted not in sets:
        raise UserError(f"GPTFAST_CPU is {wanted!r}; this processor runs {', '.join(sets)}; none is plain PyTorch")
    lib.sets = sets
    use(lib, wanted or sets[-1])
    return lib


def use(lib: ctypes.CDLL, name: str) -> None:
    """Run this set's kernels from now on, for weights that are packed from now on."""
    lib.name, lib.lanes = name, lib.gptfast_use(ctypes.byref(ctypes.c_char.in_dll(lib, f"gptfast_{name}")))


def physical_cores() -> int:
    """The physical cores that this process may use: of its affinity, as far as a cgroup's quota (version 2) pays."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cpus = os.sched_getaffinity(0)
    cores = {_text(f"/sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list") or n for n in cpus}
    own = _text("/proc/self/cgroup").rpartition("::")[2]
    quotas = (_text(f"/sys/fs/cgroup{path}/cpu.max").split() for path in ("", own))
    limits = [math.ceil(int(quota[0]) / int(quota[1])) for quota in quotas if quota and quota[0] != "max"]
    return max(1, min([len(cores), *limits]))


def _text(path: str) -> str:
    """What a file of the kernel's says, or nothing."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _build() -> Path:
    """The compiled library, of the user's cache or anew. Raises OSError or CalledProcessError where that fails."""
    compiler = tuple(shlex.split(os.environ.get("CXX") or "c++"))  # more than a word with ccache
    made_by = (compiler, FLAGS, SETS, platform.machine(), sys.platform)
    key = hashlib.sha256(repr(made_by).encode() + b"".join((HERE / name).read_bytes() for name in SOURCES))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptfast"
    path = folder / f"cpu-{key.hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder / "lock"):  # of several processes one compiles
            if not path.exists():
                with tempfile.TemporaryDirectory(dir=folder) as work:
                    _compile(compiler, Path(work)).replace(path)
    return path


@contextmanager
def _alone(lock: Path):
    """Hold a lock among processes."""
    import fcntl  # Unix has it

    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(compiler: tuple[str, ...], work: Path) -> Path:
    """All objects at once, and the library of them; instruction sets that this compiler does not know are left out."""

    def start(output: str, *args: str) -> subprocess.Popen:
        command = [*compiler, *FLAGS, *args, "-o", str(work / output)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def end(process: subprocess.Popen, needed: bool = True) -> bool:
        errors = process.communicate()[1]
        if needed and process.returncode:
            raise subprocess.CalledProcessError(process.returncode, process.args, stderr=errors or "no message")
        return process.returncode == 0

    running = {"cpu.o": start("cpu.o", "-c", str(HERE / "cpu.cpp"))}
    for name, flags in SETS.items():
        running[f"{name}.o"] = start(f"{name}.o", *flags, f"-DSET={name}", "-c", str(HERE / "cpu_kernels.cpp"))
    compiled = [output for output, process in running.items() if end(process, output in ("cpu.o", "generic.o"))]
    end(start("cpu.so", "-shared", "-pthread", *(str(work / output) for output in compiled)))
    return work / "cpu.so"
