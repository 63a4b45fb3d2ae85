"""Sums over ranks of what is large, a prefill's, by the GPUs' own multiprocessors, through memory that all can reach.

    inbox(device).sum(x, residual, world)   the sum of all ranks' x [+ residual]
    sum_triton                              one message of it

Each program writes a block of its rank's values to all other ranks, and adds up what they wrote for the same block: so
many programs are at work at once that the wait of one is another's time to write. (NCCL takes twice as long for some
megabytes; copy engines are no way out, as some virtual machines have them copy through the host.)
"""

import functools
import itertools
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
from torch import Tensor

from ops.common import tl, triton

MOST_RANKS = 2  # that write all they have to all others; of more, a ring (NCCL's) moves less
PLACE = 2**24  # bytes of a message
BLOCK = 4096  # values that a program sums
BLOCKS = PLACE // (2 * BLOCK)  # of a message, at most: values have two bytes or more


def inbox_bytes(world: int) -> int:
    """What a rank's inbox takes: places for two messages from each rank (2, world, PLACE), then for the number of the
    last one of each block, int32 (2, world, BLOCKS)."""
    return 2 * world * (PLACE + BLOCKS * 4)


if triton is not None:
    _PLACE, _BLOCKS = tl.constexpr(PLACE), tl.constexpr(BLOCKS)

    @triton.jit(do_not_specialize=["rank"])  # all ranks run the same code
    def _exchange_kernel(out, x, residual, buffers, counts, rank, n, WORLD: tl.constexpr, BLOCK: tl.constexpr):
        """out (n,) = the sum, in the order of ranks, of all ranks' x (n,) [+ residual (n,)]. buffers int64 (world,):
        the inboxes' addresses; counts int32 (BLOCKS,): messages so far."""
        DTYPE: tl.constexpr = tl.pointer_type(x.dtype.element_ty)
        FLAGS: tl.constexpr = 2 * WORLD * _PLACE
        block = tl.program_id(0)
        number = tl.load(counts + block) + 1
        turn = number % 2 * WORLD
        i = block * BLOCK + tl.arange(0, BLOCK)
        own = tl.load(x + i, i < n, other=0.0)
        for other in tl.static_range(WORLD):
            if other != rank:
                place = (tl.load(buffers + other) + (turn + rank).to(tl.int64) * _PLACE).to(DTYPE)
                tl.store(tl.multiple_of(place, 16) + i, own, i < n)
        tl.debug_barrier()  # all of this program's values before their number
        for other in tl.static_range(WORLD):
            if other != rank:
                flags = (tl.load(buffers + other) + FLAGS).to(tl.pointer_type(tl.int32))
                tl.atomic_xchg(flags + (turn + rank) * _BLOCKS + block, number, sem="release", scope="sys")
        mine = tl.load(buffers + rank)
        flags = (mine + FLAGS).to(tl.pointer_type(tl.int32))
        total = tl.zeros((BLOCK,), tl.float32)
        for other in tl.static_range(WORLD):
            part = own
            if other != rank:
                flag = flags + (turn + other) * _BLOCKS + block
                got = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
                while got != number:
                    got = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
                tl.debug_barrier()
                place = (mine + (turn + other).to(tl.int64) * _PLACE).to(DTYPE)
                part = tl.load(tl.multiple_of(place, 16) + i, i < n, other=0.0, cache_modifier=".cg")
            total += part.to(tl.float32)
        if residual is not None:
            total += tl.load(residual + i, i < n, other=0.0).to(tl.float32)
        tl.store(out + i, total.to(out.dtype.element_ty), i < n)
        tl.debug_barrier()  # every thread has read the count
        tl.store(counts + block, number)


def sum_triton(
    out: Tensor, x: Tensor, residual: Tensor | None, buffers: Tensor, counts: Tensor, rank: int, world: int
) -> None:
    """out (n,) = the sum over ranks of x (n,), of PLACE bytes at most, [+ residual (n,)]; see the kernel."""
    _exchange_kernel[(triton.cdiv(len(x), BLOCK),)](
        out, x, residual, buffers, counts, rank, len(x), WORLD=world, BLOCK=BLOCK, num_warps=4
    )


class Inbox(NamedTuple):
    """Memory of each rank that the others write to. Its two places for each take turns: who writes a message after the
    next has got the next one, which the others wrote after they had read this one."""

    rank: int
    buffers: Tensor  # int64 (world,), where each rank's memory is
    counts: Tensor  # int32 (BLOCKS,), messages so far
    memory: object

    def sum(self, x: Tensor, residual: Tensor | None, world: int) -> Tensor:
        """Of all ranks' x (...) [+ residual (...)], both contiguous."""
        out, most = torch.empty_like(x), PLACE // x.element_size()
        more = itertools.repeat(None) if residual is None else residual.view(-1).split(most)
        for to, part, own in zip(out.view(-1).split(most), x.view(-1).split(most), more):
            sum_triton(to, part, own, self.buffers, self.counts, self.rank, world)
        return out


@functools.cache
def inbox(device: torch.device) -> Inbox:
    """Which all ranks make together."""
    world = dist.get_world_size()
    memory = symm_mem.empty(inbox_bytes(world), dtype=torch.uint8, device=device).zero_()
    handle = symm_mem.rendezvous(memory, dist.group.WORLD)
    dist.all_reduce(torch.zeros(1, device=device))  # waits until every inbox is empty
    counts = torch.zeros(BLOCKS, dtype=torch.int32, device=device)
    return Inbox(dist.get_rank(), torch.tensor(handle.buffer_ptrs, device=device), counts, (memory, handle))
