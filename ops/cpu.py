"""Kernels for a decode step or a short prompt on a CPU: cpu.cpp, compiled when a model is first loaded there.

linear(x, weight, scales, ...)   [residual +] W rms_norm(x) [+ bias], or SwiGLU of it, as an op
attention(qkv, k_cache, ...)     as attention.py says
ready()                          whether they can be used: without a C++ compiler plain PyTorch serves
"""

import functools
import hashlib
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

MAX_ROWS = 64  # of x; with more, weights widened to fp32 and BLAS are faster

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-shared")
FLAGS += ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math")  # sums may be vectors
VECTORS = {"AVX2": ("-mavx2", "-mfma"), "AVX512": ("-mavx2", "-mfma", "-mavx512f", "-mavx512vl")}  # elsewhere defaults


def ready() -> bool:
    """Whether the kernels are there. The first call on a machine compiles them, in some 10 s, for all later ones."""
    return _load()


ready._dynamo_marked_constant = True  # all that torch.compiler.assume_constant_result does, but it imports Dynamo: 3 s


@functools.cache
def _load() -> bool:
    try:
        torch.ops.load_library(_build())
    except (OSError, RuntimeError, ValueError, subprocess.CalledProcessError) as error:  # no home, odd quotes in CXX
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        print(f"plain PyTorch serves: the CPU kernels cannot be compiled ({reason})", file=sys.stderr)
        return False
    torch.library.register_fake("gptfast::cpu_linear", _linear_fake)
    torch.library.register_fake("gptfast::cpu_attention", _attention_fake)
    return True


def _build() -> Path:
    """The compiled library, of the user's cache or anew. Raises OSError or CalledProcessError where that fails."""
    home = Path(torch.__file__).parent
    flags = (*FLAGS, *VECTORS.get(torch.backends.cpu.get_cpu_capability(), ()), f"-I{home / 'include'}")
    compiler = shlex.split(os.environ.get("CXX") or "c++")  # more than a word with ccache
    command = [*compiler, *flags, str(SOURCE), f"-L{home / 'lib'}", "-ltorch_cpu"]
    made_by = (compiler, flags, torch.__version__, platform.machine())
    key = hashlib.sha256(repr(made_by).encode() + SOURCE.read_bytes())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptfast"
    library = folder / f"cpu-{key.hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:  # several processes may do this at once
            subprocess.run([*command, "-o", f"{work}/cpu.so"], check=True, capture_output=True, text=True)
            Path(work, "cpu.so").replace(library)
    return library


def supports_linear(weight: Tensor, scales: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether `linear` supports this weight (as on disk) and activations of this dtype."""
    return (
        weight.is_cpu
        and weight.is_contiguous()
        and dtype in (torch.float32, torch.bfloat16)
        and weight.dtype in (dtype, torch.int8, torch.uint8)
        and (scales is None or scales.dtype is torch.bfloat16)
        and (bias is None or bias.dtype is dtype)
        and ready()
    )


def linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    residual: Tensor | None,
    fp32: bool,
    swiglu: bool,
) -> Tensor:
    """[residual +] W rms_norm(x) [+ bias], or SwiGLU of it: x (..., K) -> (..., N or N / 2) in x's dtype or fp32.

    The weight is as in linear.py; norm (K,), bias (N,) and the residual, like the result, are of x's dtype.
    """
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    return torch.ops.gptfast.cpu_linear(x, weight, scales, zeros, bias, norm, eps, residual, fp32, swiglu)


def supports_attention(qkv: Tensor, k_cache: Tensor, v_cache: Tensor, input_pos: Tensor) -> bool:
    """Whether `attention` supports these. Caches may be the first positions of longer ones."""
    dtype, D = qkv.dtype, k_cache.shape[-1]
    return (
        qkv.is_cpu
        and dtype in (torch.float32, torch.bfloat16)
        and k_cache.dtype is v_cache.dtype is dtype
        and D * dtype.itemsize % 32 == 0
        and qkv.shape[1] <= MAX_ROWS
        and input_pos.dtype is torch.int64
        and k_cache.stride()[2:] == (D, 1)
        and k_cache.stride() == v_cache.stride()
        and ready()
    )


def attention(qkv: Tensor, k_cache: Tensor, v_cache: Tensor, input_pos: Tensor, *rest: object) -> Tensor:
    """What `supports_attention` said; rest: rope, q_norm, k_norm, eps, n_head, window."""
    return torch.ops.gptfast.cpu_attention(qkv.contiguous(), k_cache, v_cache, input_pos.contiguous(), *rest)


def _linear_fake(x, weight, scales, zeros, bias, norm, eps, residual, fp32, swiglu):
    N = weight.shape[0] // 2 if swiglu else weight.shape[0]
    return x.new_empty((*x.shape[:-1], N), dtype=torch.float32 if fp32 else x.dtype)


def _attention_fake(qkv, k_cache, v_cache, input_pos, rope, q_norm, k_norm, eps, n_head, window):
    return qkv.new_empty((*qkv.shape[:2], n_head * k_cache.shape[-1]))
