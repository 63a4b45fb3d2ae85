"""The device's matmul rate: the ceiling of reading long prompts."""

import time

import torch
from torch import Tensor

from ops.linear import half_is_slow


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of a product of two square matrices, the fastest of several: 8192^3 on a GPU, 1024^3 elsewhere, and in
    fp32 where that is faster; None where there is no memory for them."""
    n, repeats = (8192, 20) if device.type == "cuda" else (1024, 5)
    try:
        a = torch.randn(n, n, device=device, dtype=dtype)
        a = a.float() if half_is_slow(a, dtype) else a
        return 2 * n**3 / min(_seconds(a) for _ in range(repeats))
    except RuntimeError as error:  # torch.OutOfMemoryError, but on a CPU
        if "memory" not in str(error):
            raise
        return None


def _seconds(a: Tensor) -> float:
    begin = time.perf_counter()
    (a @ a)[0, 0].item()  # which waits for it
    return time.perf_counter() - begin
