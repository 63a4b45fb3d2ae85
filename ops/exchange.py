"""Sums over the ranks of what is large, a prefill's, while other kernels run.

    begin_sum(x, turn)   start to add up x; the result waits for the sum

On GPUs of one machine a few programs of each write its part to the others' memory, and a kernel adds up what has come:
NCCL's kernels would take more multiprocessors from products whose tiles fill all of them (and copy engines are no way
out: some virtual machines have them copy through the host). Otherwise NCCL or gloo does it.
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
TURNS = 4
PROGRAMS = 4  # that write: what products of 128 tiles leave free of 132 multiprocessors
WRITTEN, ADDED = 16384, 4096  # values that a program writes, or adds up, at once

if triton is not None:

    @triton.jit(do_not_specialize=["turn", "rank"])
    def _write_kernel(
        x, buffers, sent, n, share, size, flags, turn, rank, WORLD: tl.constexpr, PROGRAMS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        """This rank's x (n,), `share` values a program, to its place in the inboxes of all others, then the number of
        the message to each one's flags. See Inbox for the layout; `flags` is how many bytes come before these."""
        program = tl.program_id(0)
        begin = program * share
        end = tl.minimum(begin + share, n)
        of_rank = tl.full((), turn * WORLD + rank, tl.int64)
        for first in range(begin, end, BLOCK):
            i = first + tl.arange(0, BLOCK)
            v = tl.load(x + i, i < end, other=0.0)
            for other in tl.static_range(WORLD):
                if other != rank:
                    inbox = tl.load(buffers + other).to(tl.pointer_type(x.dtype.element_ty)) + of_rank * size
                    tl.store(tl.multiple_of(inbox, 16) + i, v, i < end)
        tl.debug_barrier()  # all of this program's stores before its flag
        number = tl.load(sent + program) + 1
        for other in tl.static_range(WORLD):
            if other != rank:
                flag = (tl.load(buffers + other) + flags).to(tl.pointer_type(tl.int32)) + of_rank * PROGRAMS + program
                tl.atomic_xchg(flag, number, sem="release", scope="sys")
        tl.debug_barrier()
        tl.store(sent + program, number)

    @triton.jit(do_not_specialize=["turn", "rank"])
    def _add_kernel(
        x, inbox, flags, sent, n, share, size, turn, rank, WORLD: tl.constexpr, PROGRAMS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        """x (n,) becomes the sum, in the order of ranks, of all ranks' parts, of which its own is x: the others' are
        there when their flags have the number of this rank's own message."""
        first = tl.program_id(0) * BLOCK
        writer = first // share
        number = tl.load(sent + writer)
        for other in tl.static_range(WORLD):
            if other != rank:
                flag = flags + (turn * WORLD + other) * PROGRAMS + writer
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
                place = inbox + tl.full((), turn * WORLD + other, tl.int64) * size
                total += tl.load(place + i, i < n, other=0.0, cache_modifier=".cg").to(tl.float32)
        tl.store(x + i, total.to(x.dtype.element_ty), i < n)


def share_of(n: int) -> int:
    """Values that each program writes of n, in whole blocks of both kernels."""
    return triton.cdiv(triton.cdiv(n, PROGRAMS), WRITTEN) * WRITTEN


def write(x: Tensor, buffers: Tensor, sent: Tensor, size: int, turn: int, rank: int) -> None:
    """x (n,) to the inboxes at the addresses `buffers`, int64 (world,), of all others; see Inbox."""
    world = len(buffers)
    flags = TURNS * world * size * x.element_size()
    _write_kernel[(PROGRAMS,)](
        x, buffers, sent[turn], len(x), share_of(len(x)), size, flags, turn, rank, WORLD=world, PROGRAMS=PROGRAMS,
        BLOCK=WRITTEN, num_warps=32,
    )  # fmt: skip


def add(x: Tensor, memory: Tensor, sent: Tensor, size: int, turn: int, rank: int, world: int) -> None:
    """x (n,), which `write` has sent, becomes the sum over the ranks, when all others' parts are in `memory`."""
    flags = TURNS * world * size * x.element_size()
    _add_kernel[(triton.cdiv(len(x), ADDED),)](
        x, memory[:flags].view(x.dtype), memory[flags:].view(torch.int32), sent[turn], len(x), share_of(len(x)), size,
        turn, rank, WORLD=world, PROGRAMS=PROGRAMS, BLOCK=ADDED, num_warps=8,
    )  # fmt: skip


def inbox_bytes(size: int, itemsize: int, world: int) -> int:
    """What a rank's inbox takes: a place for a part of `size` values (TURNS, world, size), and flags int32 (TURNS,
    world, PROGRAMS), the number of the last message of each program of a rank."""
    return TURNS * world * (size * itemsize + PROGRAMS * 4)


class Inbox:
    """Memory of each rank that the others write to; see `inbox_bytes`.

    overlap.py's halves have two turns each. A place is free again at its second message from then on: who writes that
    has got the one between, which the others wrote after they had read the first.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device):
        """All ranks make it together."""
        self.rank, self.world, self.size = dist.get_rank(), dist.get_world_size(), size
        total = inbox_bytes(size, dtype.itemsize, self.world)
        self.memory = symm_mem.empty(total, dtype=torch.uint8, device=device).zero_()
        self.handle = symm_mem.rendezvous(self.memory, dist.group.WORLD)
        self.buffers = torch.tensor(self.handle.buffer_ptrs, device=device)
        self.sent = torch.zeros(TURNS, PROGRAMS, dtype=torch.int32, device=device)
        dist.all_reduce(torch.zeros(1, device=device))  # waits until every inbox is empty
        self.stream = torch.cuda.Stream(device, priority=-1)  # its few programs come first

    def begin_sum(self, x: Tensor, turn: int) -> Callable[[], Tensor]:
        flat = x.view(-1)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            write(flat, self.buffers, self.sent, self.size, turn, self.rank)
            written = torch.cuda.Event()
            written.record()

        def wait() -> Tensor:
            torch.cuda.current_stream().wait_event(written)
            add(flat, self.memory, self.sent, self.size, turn, self.rank, self.world)
            return x

        return wait


@functools.cache
def _inbox(size: int, dtype: torch.dtype, device: torch.device) -> Inbox | None:
    """For parts of up to `size` values, or None where GPUs cannot reach each other's memory or are too many."""
    if dist.get_world_size() > MOST_RANKS or not symmetric_buffers(device):
        return None
    return Inbox(size, dtype, device)


def begin_sum(x: Tensor, turn: int) -> Callable[[], Tensor]:
    """Start to add up all ranks' x, contiguous, which is lost. The result waits, on a GPU without the host, and returns
    the sum. turn: below TURNS, see Inbox."""
    if x.is_cuda and (inbox := _inbox(1 << (x.numel() - 1).bit_length(), x.dtype, x.device)):
        return inbox.begin_sum(x, turn)
    total = x.float() if x.is_cpu else x
    work = dist.all_reduce(total, async_op=True)

    def wait() -> Tensor:
        work.wait()
        return total.to(x.dtype)

    return wait
