"""What the Triton kernels of a decode step (gemv.py, attention.py, sampling.py, lookup.py, exchange.py, tp.py)
share, and the measure of all of them: the device's read bandwidth.

Each is a torch op (namespace gptfast) with a plain PyTorch reference beside it: `torch.compile(fullgraph=True)` and
CUDA graphs see through it, and none synchronises with the host.

Kernels start by programmatic dependent launch: the next one comes up early, and may read weights, but nothing that
another kernel writes, before it waits for the previous one. Weights must not come from the kernel launched just before.
"""

import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.language.extra import cuda as tlx
except ImportError:  # CPU-only builds of torch come without Triton: the references serve
    triton = tl = tlx = flat = unflat = send = receive = missing = content = None

MAX_ROWS = 16  # beyond this a step is a prefill, and cuBLAS is the right tool


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) [* weight] over the last axis, in fp32 (Zhang and Sennrich, arXiv:1910.07467)."""
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return (normed if weight is None else normed * weight.float()).to(x.dtype)


@functools.cache
def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def zeros(device: torch.device, n: int) -> Tensor:
    """Counters that every kernel leaves as it found them, at zero. One stream of a device may use them at a time."""
    return torch.zeros(n, dtype=torch.int32, device=device)


@functools.cache
def slots(device: torch.device, groups: int, size: int) -> tuple[Tensor, Tensor]:
    """Places for `size` messages (see `send`) in each group, and the number of each group's last ones, both int64. One
    stream of a device may use them at a time."""
    memory = torch.zeros(groups * (size + 1), dtype=torch.int64, device=device)
    return memory[:-groups], memory[-groups:]


def fits(x: Tensor) -> bool:
    """Whether the kernels take these rows: x (..., K) on CUDA, in 16 bits, at most 16 rows."""
    return triton is not None and x.is_cuda and x.element_size() == 2 and x.numel() <= MAX_ROWS * x.shape[-1]


def op(name: str, mutates: tuple[str, ...] = ()) -> Callable[[Callable], Callable]:
    """Make a function the op gptfast::name. (torch.library.custom_op adds what training needs, 60 us a call.)"""

    def register(function: Callable) -> Callable:
        schema = torch.library.infer_schema(function, mutates_args=mutates)
        torch.library.define(f"gptfast::{name}", schema, tags=[torch.Tag.pt2_compliant_tag])
        torch.library.impl(f"gptfast::{name}", "CompositeExplicitAutograd", function)
        return getattr(torch.ops.gptfast, name).default

    return register


def read_bandwidth(device: torch.device | str) -> float:
    """Bytes a second that a sum over a large array reads: the ceiling of decoding, which reads each weight once."""
    device = torch.device(device)
    if device.type != "cuda" or triton is None:
        x = torch.ones(2**28, dtype=torch.float32, device=device)  # 1 GiB
        times = []
        for _ in range(5):
            start = time.perf_counter()
            x.sum().item()
            times.append(time.perf_counter() - start)
        return x.nbytes / min(times)
    free, _ = torch.cuda.mem_get_info(device)
    n = min(2**30, free // 2 // 4)  # 4 GiB, many times any cache
    x = torch.ones(n, dtype=torch.float32, device=device)
    block, steps = 4096, 8
    programs = triton.cdiv(n, block * steps)
    out = torch.empty(programs, dtype=torch.float32, device=device)
    times = []
    for _ in range(100):  # a GPU that was idle takes a while to run at full clock
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        _sum_kernel[(programs,)](out, x, n, BLOCK=block, STEPS=steps, num_warps=8)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return x.nbytes / min(times)


if triton is not None:

    @triton.jit
    def flat(x, W: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
        """Offsets or a mask of axes (j i W R C u) as (C R W i j, u), of which a load gives each lane what lies along u.

        Triton hands out lanes, then warps, to the axes of a load in order of their contiguity. Where axes tie, 3.6
        begins with the first one and 3.7 with the last one; two axes leave no choice, and the lanes become j and i, the
        warps W. Along u, offsets have to be neighbours from a multiple of u's size on, and a mask the same, as Triton
        does not see through the reshape.
        """
        U: tl.constexpr = x.shape[5]
        x = tl.broadcast_to(x, (4, 8, W, R, C, U)).permute(4, 3, 2, 1, 0, 5).reshape(32 * W * R * C, U)
        if x.dtype == tl.int1:
            x = tl.max_constancy(x, (1, U))
        else:
            x = tl.max_contiguous(tl.multiple_of(x, (1, U)), (1, U))
        return x

    @triton.jit
    def unflat(x, W: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
        """The inverse of flat, for what has been loaded."""
        return x.reshape(C, R, W, 8, 4, x.shape[1]).permute(4, 3, 2, 1, 0, 5)

    @triton.jit
    def send(to, value, number, mask):
        """Put 4 bytes and the message's number, int64 below 2^32, in a place where that number never was before. A GPU
        writes the 8 bytes as one, so that no other signal is needed (NCCL's LL protocol)."""
        tl.store(to, (value.to(tl.int32, bitcast=True).to(tl.int64) << 32) | number, mask=mask)

    @triton.jit
    def receive(at, number, mask):
        """What is there now, as int64, for `missing` and `content`. Where there is no mask, a message of 0.

        A tile has to have an element for every thread, or more: of threads with the same one, Triton asks just one
        whether its message is missing, and the others, which looked for themselves, would go on without theirs.
        """
        return tl.load(at, mask=mask, other=number, volatile=True)

    @triton.jit
    def missing(message, number):
        """1 where the message has yet to arrive, else 0."""
        return ((message & 0xFFFFFFFF) != number).to(tl.int32)

    @triton.jit
    def content(message, DTYPE: tl.constexpr):
        return (message >> 32).to(tl.int32).to(DTYPE, bitcast=True)

    @triton.jit
    def _sum_kernel(out, x, N, BLOCK: tl.constexpr, STEPS: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS) + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for _ in range(STEPS):
            total += tl.load(x + at, mask=at < N, other=0.0)
            at += BLOCK
        tl.store(out + tl.program_id(0), tl.sum(total, 0))
