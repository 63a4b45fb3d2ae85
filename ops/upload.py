"""Tensors from the host's memory, or from a mapped file, to a GPU's.

    upload(t, device, dtype)    t.to(device, dtype), for a large t some times as fast

Left to itself CUDA copies memory that is not pinned with one processor, into pinned memory of its own. Here several
fill pinned buffers, which the GPU reads meanwhile. (PyTorch's parallel copy is slower than memmove on one processor.)
"""

import ctypes
import functools
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import torch
from torch import Tensor

from ops.cpu_library import physical_cores

PIECE = 2**23  # bytes of a buffer, two a thread; memory is pinned at some GB/s, so that many would cost what they save
THREADS = 8  # which copy as fast as a GPU reads


@functools.cache
def _workers(device: torch.device) -> tuple[ThreadPoolExecutor, SimpleQueue]:
    """Threads, and buffers that are free once the device has passed their events."""
    count, free = min(THREADS, physical_cores()), SimpleQueue()
    for _ in range(2 * count):
        free.put((torch.empty(PIECE, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()))
    return ThreadPoolExecutor(count), free


def upload(t: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """t.to(device, dtype), contiguous"""
    device = torch.device(device)
    if device.type != "cuda" or not t.is_cpu or t.nbytes < PIECE // 2:
        return t.contiguous().to(device, dtype)
    t, out = t.contiguous(), torch.empty(t.shape, dtype=t.dtype, device=device)
    stream, (threads, free) = torch.cuda.current_stream(device), _workers(device)

    def copy(to: Tensor, of: Tensor) -> None:
        buffer, read = free.get()
        read.synchronize()
        ctypes.memmove(buffer.data_ptr(), of.data_ptr(), len(of))
        with torch.cuda.stream(stream):
            to.copy_(buffer[: len(of)], non_blocking=True)
            read.record()
        free.put((buffer, read))

    pieces = (flat.view(-1).view(torch.uint8).split(PIECE) for flat in (out, t))
    for _ in threads.map(copy, *pieces):
        pass
    return out.to(dtype or t.dtype)
