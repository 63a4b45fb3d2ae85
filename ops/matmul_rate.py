"""The device's matmul rate: the ceiling of reading long prompts."""

import time

import torch
from torch import Tensor


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product of two square matrices, the fastest of several: 8192^3 on a GPU, 1024^3 elsewhere."""
    n, repeats = (8192, 20) if device.type == "cuda" else (1024, 5)
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(_seconds(a) for _ in range(repeats))


def _seconds(a: Tensor) -> float:
    begin = time.perf_counter()
    (a @ a)[0, 0].item()  # which waits for it
    return time.perf_counter() - begin
