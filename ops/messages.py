"""Messages between programs of a kernel, or between GPUs: 4 bytes and a number, in one store of 8 bytes.

A GPU writes 8 bytes as one, so that no other signal is needed (NCCL's LL protocol): whoever reads the number that it
waits for has the content, too.
"""

import functools

import torch
from torch import Tensor

from ops.common import tl, triton


@functools.cache
def slots(device: torch.device, groups: int, size: int) -> tuple[Tensor, Tensor]:
    """Places for `size` messages in each group, and the number of each group's last ones, both int64. One stream of a
    device may use them at a time."""
    memory = torch.zeros(groups * (size + 1), dtype=torch.int64, device=device)
    return memory[:-groups], memory[-groups:]


if triton is None:
    send = receive = missing = content = None
else:

    @triton.jit
    def send(to, value, number, mask):
        """Put 4 bytes and the message's number, int64 below 2^32, in a place where that number never was before."""
        tl.store(to, (value.to(tl.int32, bitcast=True).to(tl.int64) << 32) | number, mask=mask)

    @triton.jit
    def receive(at, number, mask):
        """What is there now, as int64, for `missing` and `content`. Where there is no mask, a message of 0.

        A tile has to have an element for every thread, or more: of threads with the same one, Triton asks just one
        whether its message is missing, and the others, which looked for themselves, would go on without theirs.
        """
        return tl.load(at, mask=mask, other=number, volatile=True)

    @triton.jit
    def missing(message, number):
        """1 where the message has yet to arrive, else 0."""
        return ((message & 0xFFFFFFFF) != number).to(tl.int32)

    @triton.jit
    def content(message, DTYPE: tl.constexpr):
        return (message >> 32).to(tl.int32).to(DTYPE, bitcast=True)
