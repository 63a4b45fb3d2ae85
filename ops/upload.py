"""Tensors from the host's memory, or from a mapped file, to a GPU's.

    upload(t, device, dtype)    t.to(device, dtype), for a large t some times as fast

Left to itself CUDA copies memory that is not pinned with one processor, into pinned memory of its own. Here all of them
fill one of two pinned buffers, while the GPU reads the other one.
"""

import functools

import torch
from torch import Tensor

BUFFER = 2**25  # bytes; memory is pinned at some GB/s, so that more would take longer than it saves


@functools.cache
def _buffers(device: torch.device) -> list[tuple[Tensor, torch.cuda.Event]]:
    """Each with the event that the GPU has read it, on one stream."""
    return [(torch.empty(BUFFER, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()) for _ in range(2)]


def upload(t: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """t.to(device, dtype)"""
    device, dtype = torch.device(device), dtype or t.dtype
    if device.type != "cuda" or not t.is_cpu or t.nbytes < BUFFER // 8:
        return t.contiguous().to(device, dtype)
    out = torch.empty(t.shape, dtype=dtype, device=device)
    parts = zip(*(flat.split(BUFFER // dtype.itemsize) for flat in (out.view(-1), t.contiguous().view(-1))))
    buffers = _buffers(device)
    for turn, (to, of) in enumerate(parts):
        buffer, read = buffers[turn % 2]
        read.synchronize()
        staged = buffer.view(dtype)[: len(of)]
        staged.copy_(of)
        to.copy_(staged, non_blocking=True)
        read.record()
    return out
