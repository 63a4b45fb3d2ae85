"""All-reduce and all-gather of a decode step: what ranks on the GPUs of one machine send each other, through memory
that all can reach.

    all_reduce(x, gather, rank, world)   the sum of all ranks [+ residual], or their parts side by side, as an op
    deliver, addresses                   the same inside another kernel: linear_triton.py's, which sums tile by tile
    symmetric_buffers(device)            the memory, or None

Messages are those of messages.py. A symmetric buffer has two places for each, which take turns. Two suffice: who sends
message n + 2 has received all of n + 1, and these were sent after their senders had read n.
"""

import functools
import os
import sys

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
from torch import Tensor

from ops import exchange, unpacking
from ops.common import MAX_ROWS, on_triton, op, pdl, tl, tlx, triton
from ops.messages import content, missing, receive, send

MAX_WORDS = 2**17  # of 4 bytes, a rank; more than that (a prefill) is exchange.py's
BLOCK = 256  # words a program of the all-reduce kernel
MAX_FEATURES = 2**14  # of a row that the linear kernel sums


@op("all_reduce")
def all_reduce(x: Tensor, gather: bool, rank: int, world: int, residual: Tensor | None = None) -> Tensor:
    """Of x (..., n) on every rank: the sum [+ residual (..., n)] or, to gather, the ranks' parts side by side,
    (..., world n), without a residual.

    Every rank gets the same bits. On GPUs with peer access a kernel of ours does it, but for what is large and of more
    than two ranks or gathered; otherwise NCCL, and on a CPU gloo.
    """
    words = x.numel() * x.element_size() // 4
    if on_triton(x) and x.shape[-1] * x.element_size() % 4 == 0 and (buffers := symmetric_buffers(x.device)):
        residual = None if residual is None else residual.contiguous()
        if words <= MAX_WORDS:
            return all_reduce_triton(x.contiguous(), gather, rank, world, *buffers[0], residual)
        if not gather and world <= exchange.MOST_RANKS:
            return exchange.inbox(x.device).sum(x.contiguous(), residual, world)
    if gather:
        parts = [torch.empty_like(x) for _ in range(world)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, -1)
    total = x.to(torch.float32 if x.is_cpu else x.dtype, copy=True)
    dist.all_reduce(total)
    return (total if residual is None else total + residual).to(x.dtype)


@torch.library.register_fake("gptfast::all_reduce")
def all_reduce_fake(x, gather, rank, world, residual=None):
    return x.new_empty((*x.shape[:-1], x.shape[-1] * (world if gather else 1)))


@functools.cache
def symmetric_buffers(device: torch.device) -> tuple | None:
    """For the all-reduce kernel and for the linear kernel: the address of each rank's buffer, int64 (world,), and the
    number of all-reduces so far, int64, of each program and of each 8 features; and what keeps them alive. None where
    GPUs cannot reach each other's memory. Every rank must call it.
    """
    world = dist.get_world_size()
    if triton is None or int(os.environ.get("LOCAL_WORLD_SIZE", 0)) != world:
        return None
    if not all(torch.cuda.can_device_access_peer(i, j) for i in range(world) for j in range(i)):
        return None
    slots = (MAX_WORDS, MAX_FEATURES * MAX_ROWS)
    buffers = torch.zeros(world, dtype=torch.int64, device=device)
    try:
        memory = symm_mem.empty(2 * world * sum(slots), dtype=torch.int64, device=device).zero_()
        handle = symm_mem.rendezvous(memory, dist.group.WORLD)
        buffers += torch.tensor(handle.buffer_ptrs, device=device)
    except RuntimeError as error:
        print(f"NCCL serves: no memory is shared between GPUs ({str(error).splitlines()[0]})", file=sys.stderr)
    ready = buffers.amin()
    dist.all_reduce(ready, dist.ReduceOp.MIN)  # also waits until every buffer is empty
    counts = [torch.zeros(n, dtype=torch.int64, device=device) for n in (MAX_WORDS // BLOCK, MAX_FEATURES // 8)]
    second = buffers + 2 * world * slots[0] * 8
    return ((buffers, counts[0]), (second, counts[1]), memory, handle) if ready.item() else None


def all_reduce_triton(x, gather, rank, world, buffers, counts, residual=None):
    """One launch of the all-reduce kernel: x contiguous, in whole words of 4 bytes along its last dimension; so is the
    residual."""
    out = all_reduce_fake(x, gather, rank, world)
    width = x.shape[-1] * x.element_size() // 4
    words = x.numel() * x.element_size() // 4
    _all_reduce_kernel[(triton.cdiv(words, BLOCK),)](
        out.view(torch.int32), x.view(torch.int32), None if residual is None else residual.view(torch.int32), buffers,
        counts, rank, words, width,
        WORLD=world, RANKS=triton.next_power_of_2(world), SLOTS=MAX_WORDS, GATHER=gather, DTYPE=_TRITON[x.dtype],
        BLOCK=BLOCK, num_warps=4, **pdl(x.device),
    )  # fmt: skip
    return out


if triton is not None:
    INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
    WAIT = tl.constexpr(  # for a message at $1 with number $2, and take its content; 0 unless $3
        "{ .reg .pred p; .reg .b32 number; mov.b32 $0, 0; setp.eq.b32 p, $3, 0; @p bra done; "
        "again: ld.volatile.global.v2.b32 {number, $0}, [$1]; setp.ne.b32 p, number, $2; @p bra again; done: }"
    )
    _TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

    @triton.jit
    def addresses(buffers, source, rank, WORLD: tl.constexpr, SLOTS: tl.constexpr):
        """Where this rank's messages go in the buffer of each rank in `source`, and those of each come in its own."""
        theirs = tl.load(buffers + source, mask=source < WORLD, other=0) + rank * (SLOTS * 8)
        mine = tl.load(buffers + rank) + source.to(tl.int64) * (SLOTS * 8)
        return theirs.to(tl.pointer_type(tl.int64)), mine.to(tl.pointer_type(tl.int64))

    @triton.jit
    def deliver(word, theirs, mine, at, mask, count, WORLD: tl.constexpr, SLOTS: tl.constexpr):
        """Send int32 `word` at slots `at` to all ranks, as number `count` int64 there, and wait for theirs:
        int32, of mask's shape, whose first axis is that of `addresses`; 0 where it is not set."""
        number = tl.broadcast_to(count & 0xFFFFFFFF, mask.shape)
        place = count % 2 * (WORLD * SLOTS) + at
        send(theirs + place, word, number, mask)
        alone: tl.constexpr = False if INTERPRETED else mask.numel <= tlx.num_threads()
        if alone:  # each thread waits for one message, without the barriers of tl.max
            arguments = [mine + place, number.to(tl.int32), mask.to(tl.int32)]
            word = tl.inline_asm_elementwise(WAIT, "=&r,l,r,r", arguments, tl.int32, is_pure=False, pack=1)
        else:
            got = receive(mine + place, number, mask)
            while tl.max(missing(got, number)) != 0:
                got = receive(mine + place, number, mask)
            word = content(got, tl.int32)
        return word

    @triton.jit(do_not_specialize=["rank", "words"])  # all ranks run the same code, and so sum in the same order
    def _all_reduce_kernel(
        out, x, residual, buffers, counts, rank, words, width,
        WORLD: tl.constexpr, RANKS: tl.constexpr, SLOTS: tl.constexpr, GATHER: tl.constexpr, DTYPE: tl.constexpr,
        BLOCK: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """Each rank writes its words into everyone's buffer and waits for everyone's in its own; to the sum all of them
        add the residual, which they all have."""
        pid = tl.program_id(0)
        at = pid * BLOCK + tl.arange(0, BLOCK)[None, :]
        source = tl.arange(0, RANKS)[:, None]
        sent = at < words
        mask = sent & (source < WORLD)
        theirs, mine = addresses(buffers, source, rank, WORLD, SLOTS)
        if PDL:
            tlx.gdc_launch_dependents()
            tlx.gdc_wait()
        count = tl.load(counts + pid) + 1
        if residual is not None:
            own = tl.load(residual + at, mask=sent, other=0)
        got = deliver(tl.load(x + at, mask=sent, other=0), theirs, mine, at, mask, count, WORLD, SLOTS)
        if GATHER:
            tl.store(out + (at // width) * (WORLD * width) + source * width + at % width, got, mask=mask)
        elif DTYPE is tl.float32:
            total = tl.sum(got.to(tl.float32, bitcast=True), 0, keep_dims=True)
            if residual is not None:
                total += own.to(tl.float32, bitcast=True)
            tl.store(out + at, total.to(tl.int32, bitcast=True), mask=sent)
        else:
            low, high = unpacking.halves(got, DTYPE)
            low, high = tl.sum(low, 0, keep_dims=True), tl.sum(high, 0, keep_dims=True)
            if residual is not None:
                own_low, own_high = unpacking.halves(own, DTYPE)
                low, high = low + own_low, high + own_high
            low, high = low.to(DTYPE).to(tl.int16, bitcast=True), high.to(DTYPE).to(tl.int16, bitcast=True)
            tl.store(out + at, (high.to(tl.int32) << 16) | (low.to(tl.int32) & 0xFFFF), mask=sent)
        tl.debug_barrier()  # every thread has read the count
        tl.store(counts + pid, count)
