"""Sums over the ranks of what is large, a prefill's, by the GPUs' own multiprocessors.

    inbox(size, dtype, device).sum(x)   the sum of all ranks' x of up to `size` values

For GPUs that reach each other's memory. A kernel writes a rank's part to the others' memory, and another one adds up what has come. (NCCL takes twice as long
for some megabytes. Copy engines are no way out: some virtual machines have them copy through the host.)
"""

import functools

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
from torch import Tensor

from ops.common import tl, triton

MOST_RANKS = 4  # that write all of their parts to all others; a ring moves less
PROGRAMS = 264  # that write
WRITTEN, ADDED = 8192, 4096  # values that a program writes, or adds up, at once

if triton is not None:

    @triton.jit(do_not_specialize=["rank"])
    def _write_kernel(
        x, buffers, sent, n, share, size, flags, rank, WORLD: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr
    ):
        """This rank's x (n,), `share` values a program, to its place in the inboxes of all others, then the number of
        the message to each one's flags. See `inbox_bytes` for the layout; `flags` bytes come before these."""
        program = tl.program_id(0)
        number = tl.load(sent + program) + 1
        of_rank = number % 2 * WORLD + rank
        begin = program * share
        end = tl.minimum(begin + share, n)
        for first in range(begin, end, BLOCK):
            i = first + tl.arange(0, BLOCK)
            v = tl.load(x + i, i < end, other=0.0)
            for other in tl.static_range(WORLD):
                if other != rank:
                    inbox = tl.load(buffers + other).to(tl.pointer_type(x.dtype.element_ty))
                    inbox += of_rank.to(tl.int64) * size
                    tl.store(tl.multiple_of(inbox, 16) + i, v, i < end)
        tl.debug_barrier()  # all of this program's stores before its flag
        for other in tl.static_range(WORLD):
            if other != rank:
                flag = (tl.load(buffers + other) + flags).to(tl.pointer_type(tl.int32)) + of_rank * PROGRAMS + program
                tl.atomic_xchg(flag, number, sem="release", scope="sys")
        tl.store(sent + program, number)

    @triton.jit(do_not_specialize=["rank"])
    def _add_kernel(
        out, x, inbox, flags, sent, n, share, size, rank, WORLD: tl.constexpr, PROGRAMS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        """out (n,) = the sum, in the order of ranks, of all ranks' parts, of which its own is x: the others' are there
        when their flags have the number of this rank's own message."""
        first = tl.program_id(0) * BLOCK
        writer = first // share
        number = tl.load(sent + writer)
        turn = number % 2 * WORLD
        for other in tl.static_range(WORLD):
            if other != rank:
                flag = flags + (turn + other) * PROGRAMS + writer
                got = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
                while got != number:
                    got = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
        tl.debug_barrier()
        i = first + tl.arange(0, BLOCK)
        own = tl.load(x + i, i < n, other=0.0).to(tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for other in tl.static_range(WORLD):
            if other == rank:
                total += own
            else:
                place = inbox + (turn + other).to(tl.int64) * size
                total += tl.load(place + i, i < n, other=0.0, cache_modifier=".cg").to(tl.float32)
        tl.store(out + i, total.to(out.dtype.element_ty), i < n)


def share_of(n: int) -> int:
    """Values that each program writes of n, in whole blocks of both kernels."""
    return triton.cdiv(triton.cdiv(n, PROGRAMS), WRITTEN) * WRITTEN


def inbox_bytes(size: int, itemsize: int, world: int) -> int:
    """What a rank's inbox takes: places for two messages' parts of `size` values (2, world, size), and flags int32 (2,
    world, PROGRAMS), the number of the last message of each program of a rank."""
    return 2 * world * (size * itemsize + PROGRAMS * 4)


def write(x: Tensor, buffers: Tensor, sent: Tensor, size: int, rank: int) -> None:
    """x (n,) to the inboxes at the addresses `buffers`, int64 (world,), of all others; sent: int32 (PROGRAMS,), how
    many messages there have been."""
    flags = 2 * len(buffers) * size * x.element_size()
    _write_kernel[(PROGRAMS,)](
        x, buffers, sent, len(x), share_of(len(x)), size, flags, rank, WORLD=len(buffers), PROGRAMS=PROGRAMS,
        BLOCK=WRITTEN, num_warps=16,
    )  # fmt: skip


def add(x: Tensor, memory: Tensor, sent: Tensor, size: int, rank: int, world: int) -> Tensor:
    """The sum over the ranks of x (n,), which `write` has sent, when all others' parts are in `memory`."""
    out, flags = torch.empty_like(x), 2 * world * size * x.element_size()
    _add_kernel[(triton.cdiv(len(x), ADDED),)](
        out, x, memory[:flags].view(x.dtype), memory[flags:].view(torch.int32), sent, len(x), share_of(len(x)), size,
        rank, WORLD=world, PROGRAMS=PROGRAMS, BLOCK=ADDED, num_warps=8,
    )  # fmt: skip
    return out


class Inbox:
    """Memory of each rank that the others write to; see `inbox_bytes`. Its two places take turns: who writes the message
    after the next has got the next one, which the others wrote after they had read this one."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device):
        """All ranks make it together."""
        self.rank, self.world, self.size = dist.get_rank(), dist.get_world_size(), size
        total = inbox_bytes(size, dtype.itemsize, self.world)
        self.memory = symm_mem.empty(total, dtype=torch.uint8, device=device).zero_()
        self.handle = symm_mem.rendezvous(self.memory, dist.group.WORLD)
        self.buffers = torch.tensor(self.handle.buffer_ptrs, device=device)
        self.sent = torch.zeros(PROGRAMS, dtype=torch.int32, device=device)
        dist.all_reduce(torch.zeros(1, device=device))  # waits until every inbox is empty

    def sum(self, x: Tensor) -> Tensor:
        """x (...), contiguous, of all ranks added up."""
        flat = x.view(-1)
        write(flat, self.buffers, self.sent, self.size, self.rank)
        return add(flat, self.memory, self.sent, self.size, self.rank, self.world).view(x.shape)


@functools.cache
def inbox(size: int, dtype: torch.dtype, device: torch.device) -> Inbox | None:
    """For parts of up to `size` values; None for too many ranks."""
    return Inbox(size, dtype, device) if dist.get_world_size() <= MOST_RANKS else None
