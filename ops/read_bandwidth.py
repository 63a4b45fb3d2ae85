"""The device's read bandwidth: the ceiling of decoding, which reads each weight once."""

import time

import torch

from ops.common import tl, triton


def read_bandwidth(device: torch.device | str) -> float:
    """Bytes a second that a sum over a large array reads, the fastest of several (5 on a CPU, 100 on a GPU)."""
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
    def _sum_kernel(out, x, N, BLOCK: tl.constexpr, STEPS: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS) + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for _ in range(STEPS):
            total += tl.load(x + at, mask=at < N, other=0.0)
            at += BLOCK
        tl.store(out + tl.program_id(0), tl.sum(total, 0))
