"""The device's read bandwidth: the ceiling of decoding, which reads each weight once."""

import time

import torch
from torch import Tensor

from ops.common import tl, triton
from ops.memory import allocate, free_memory

CPU_BYTES = (2**30, 2**28, 2**26)  # of the array, the first that there is memory for: a cache would hold a smaller one


def read_bandwidth(device: torch.device | str) -> float | None:
    """Bytes a second that a sum over a large array reads, the fastest of several (5 on a CPU, 100 on a GPU); None where
    there is no memory for it.
    """
    device = torch.device(device)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    sizes = (min(2**32, free // 2),) if device.type == "cuda" else CPU_BYTES  # 4 GiB, many times any cache
    for size in (size for size in sizes if CPU_BYTES[-1] <= size <= free // 2):
        try:
            huge = allocate(size) if device.type == "cpu" else None  # as weights have them
            x = torch.empty(size // 4, device=device) if huge is None else torch.frombuffer(huge, dtype=torch.float32)
            x.fill_(1)
            return x.nbytes / min(_gpu_times(x) if x.is_cuda and triton is not None else _times(x))
        except RuntimeError as error:  # torch.OutOfMemoryError, but on a CPU
            if "memory" not in str(error):
                raise
    return None


def _times(x: Tensor) -> list[float]:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        x.sum().item()
        times.append(time.perf_counter() - start)
    return times


def _gpu_times(x: Tensor) -> list[float]:
    block, steps = 4096, 8
    programs = triton.cdiv(x.numel(), block * steps)
    out, times = torch.empty(programs, dtype=torch.float32, device=x.device), []
    for _ in range(100):  # a GPU that was idle takes a while to run at full clock
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        _sum_kernel[(programs,)](out, x, x.numel(), BLOCK=block, STEPS=steps, num_warps=8)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return times


if triton is not None:

    @triton.jit
    def _sum_kernel(out, x, N, BLOCK: tl.constexpr, STEPS: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS) + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for _ in range(STEPS):
            total += tl.load(x + at, mask=at < N, other=0.0)
            at += BLOCK
        tl.store(out + tl.program_id(0), tl.sum(total, 0))
