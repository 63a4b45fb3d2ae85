"""What the files of ops/ share: Triton where there is one, how an op is registered, how a decode step's kernels start.

Kernels start by programmatic dependent launch (PDL): the next one comes up early, and may read weights, but nothing
that another kernel writes, before it waits for the previous one. Weights must not come from the kernel launched before.
"""

import functools
import os
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

triton = tl = tlx = None  # without it plain PyTorch serves
# It takes a while to import, and a torch for CPUs alone uses it only to interpret kernels, or to compile them for a GPU
# elsewhere (scripts/compile_only.py, which has imported it).
if torch.version.cuda or torch.version.hip or "TRITON_INTERPRET" in os.environ or "triton" in sys.modules:
    try:
        import triton
        import triton.language as tl
        from triton.language.extra import cuda as tlx
    except ImportError:  # all of it or none
        triton = tl = tlx = None

MAX_ROWS = 16  # of the kernels of a decode step; with more a step is a prefill, and cuBLAS is the right tool


FUNCTIONS: dict[str, Callable] = {}  # of our ops


def op(name: str, mutates: tuple[str, ...] = ()) -> Callable[[Callable], Callable]:
    """Make a function the torch op gptfast::name, which torch.compile(fullgraph=True) and CUDA graphs see through.
    (torch.library.custom_op adds what training needs, 60 us a call.)"""

    def register(function: Callable) -> Callable:
        schema = torch.library.infer_schema(function, mutates_args=mutates)
        torch.library.define(f"gptfast::{name}", schema, tags=[torch.Tag.pt2_compliant_tag])
        torch.library.impl(f"gptfast::{name}", "CompositeExplicitAutograd", function)
        FUNCTIONS[name] = function
        return getattr(torch.ops.gptfast, name).default

    return register


class Gpu(NamedTuple):
    """What launches depend on."""

    name: str
    capability: tuple[int, int]
    processors: int  # streaming multiprocessors


@functools.cache
def gpu(device: torch.device) -> Gpu:
    if device.type != "cuda":
        return Gpu(device.type, (0, 0), 132)
    found = torch.cuda.get_device_properties(device)
    return Gpu(found.name, (found.major, found.minor), found.multi_processor_count)


def is_hopper(device: torch.device) -> bool:
    return gpu(device).capability >= (9, 0)


def pdl(device: torch.device) -> dict[str, bool]:
    """How a kernel is launched that waits for the one before by itself, where the GPU can do so."""
    return {"PDL": True, "launch_pdl": True} if is_hopper(device) else {"PDL": False}


@functools.cache
def counters(device: torch.device, n: int) -> Tensor:
    """int32 (n,) that every kernel leaves as it found them, at zero. One stream of a device may use them at a time."""
    return torch.zeros(n, dtype=torch.int32, device=device)


def on_triton(x: Tensor) -> bool:
    """Whether kernels for any number of rows serve this tensor. One without memory stands for a GPU's, see ahead.py."""
    return triton is not None and (x.is_cuda or x.is_meta)


def few_rows_on_triton(x: Tensor) -> bool:
    """Whether the kernels of a decode step serve x (..., K): 16 bits, and at most MAX_ROWS rows."""
    return on_triton(x) and x.element_size() == 2 and x.numel() <= MAX_ROWS * x.shape[-1]
