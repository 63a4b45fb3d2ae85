"""Sums over the ranks of what is large, a prefill's, while other kernels run.

    begin_sum(x, turn)   start to add up x; the result waits for the sum

On GPUs of one machine each rank's copy engines write its part to the others' memory (torch's symmetric memory), and a
small kernel adds up: NCCL's kernels would take multiprocessors from products whose tiles fill all of them. Otherwise
NCCL or gloo does it.
"""

import functools
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
from torch import Tensor

from ops.common import tl, triton
from ops.symmetric import symmetric_buffers

MOST_RANKS = 4  # that write all of their parts to all others; a ring moves less
BLOCK = 4096  # values that a program adds up
TURNS = 2

if triton is not None:

    @triton.jit
    def _sum_kernel(x, parts, n, stride, rank, WORLD: tl.constexpr, BLOCK: tl.constexpr):
        """x (n,) becomes the sum of all ranks' parts (WORLD, stride), of which its own is x, in their order."""
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        own = tl.load(x + i, i < n, other=0.0).to(tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for other in tl.static_range(WORLD):
            part = tl.load(parts + other * stride + i, (i < n) & (other != rank), other=0.0).to(tl.float32)
            total += tl.where(other == rank, own, part)
        tl.store(x + i, total.to(x.dtype.element_ty), i < n)


class Inbox:
    """Memory of each rank that the others write to: TURNS places for a part of `size` values from each rank.

    A place is free again two messages later: who sends the second one has received the first, which the others sent
    after they had read what they got before.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device):
        """All ranks make it together."""
        group = dist.group.WORLD
        self.rank, self.world, self.size = dist.get_rank(group), dist.get_world_size(group), size
        self.memory = symm_mem.empty(TURNS * self.world * size, dtype=dtype, device=device)
        self.handle = symm_mem.rendezvous(self.memory, group)
        self.stream = torch.cuda.Stream(device)

    def begin_sum(self, x: Tensor, turn: int) -> Callable[[], Tensor]:
        self.stream.wait_stream(torch.cuda.current_stream())
        others = [(self.rank + i) % self.world for i in range(1, self.world)]
        with torch.cuda.stream(self.stream):
            flat = x.view(-1)
            for other in others:
                place = (turn * self.world + self.rank) * self.size
                self.handle.get_buffer(other, (flat.numel(),), x.dtype, place).copy_(flat)
                self.handle.put_signal(other, turn)
            for other in others:
                self.handle.wait_signal(other, turn)
            add_up(flat, self.memory.view(TURNS, self.world, self.size)[turn], self.rank)
            done = torch.cuda.Event()
            done.record()

        def wait() -> Tensor:
            torch.cuda.current_stream().wait_event(done)
            return x

        return wait


def add_up(x: Tensor, parts: Tensor, rank: int) -> None:
    """x (n,) becomes the sum, in fp32 and in the order of ranks, of parts (world, >= n), of which its own is x."""
    _sum_kernel[(triton.cdiv(len(x), BLOCK),)](
        x, parts, len(x), parts.stride(0), rank, WORLD=len(parts), BLOCK=BLOCK, num_warps=8
    )


@functools.cache
def _inbox(size: int, dtype: torch.dtype, device: torch.device) -> Inbox | None:
    """For parts of up to `size` values, or None where GPUs cannot reach each other's memory or are too many."""
    if dist.get_world_size() > MOST_RANKS or not symmetric_buffers(device):
        return None
    return Inbox(size, dtype, device)


def begin_sum(x: Tensor, turn: int) -> Callable[[], Tensor]:
    """Start to add up all ranks' x, contiguous, which is lost. The result waits, on a GPU without the host, and returns
    the sum. What follows each other takes turns 0 and 1."""
    if x.is_cuda and (inbox := _inbox(1 << (x.numel() - 1).bit_length(), x.dtype, x.device)):
        return inbox.begin_sum(x, turn)
    total = x.float() if x.is_cpu else x
    work = dist.all_reduce(total, async_op=True)

    def wait() -> Tensor:
        work.wait()
        return total.to(x.dtype)

    return wait
