"""Random numbers of sampling: the same ones on the GPU and on the CPU, however the work is split.

Philox4x32-10 (Salmon et al., SC 2011), keyed by a seed and counting (token, row, offset).
"""

import numpy as np
import torch
from torch import Tensor

from ops.common import tl, triton


def gumbel(rng: Tensor, row: Tensor, token: Tensor) -> Tensor:
    """Standard Gumbel noise of each (row, token) under rng (seed, offset): softmax sampling is argmax(logits + it)."""
    u = uniform(rng, row, token)
    # -log(1 - u), but exact where u is small, which is where the large noise comes from
    return -torch.log(torch.where(u < 0.01, u * (1 + u * (0.5 + u / 3)), -torch.log(1 - u)))


def uniform(rng: Tensor, row: Tensor, token: Tensor) -> Tensor:
    """Uniform numbers fp32 above 0 and below 1, one for each (row, token) under rng int64 (seed, offset)."""
    low32 = 0xFFFFFFFF
    seed, offset = rng.tolist()
    k0, k1 = seed & low32, seed >> 32 & low32
    c0, c1 = (t.cpu().numpy().astype(np.uint64) for t in (token, row))  # PyTorch has no arithmetic on uint64
    c2, c3 = (np.full_like(c0, word) for word in (offset & low32, offset >> 32 & low32))
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & low32, p0 >> 32 ^ c3 ^ k1, p0 & low32
        k0, k1 = k0 + 0x9E3779B9 & low32, k1 + 0xBB67AE85 & low32
    u = (torch.from_numpy(c0.astype(np.int64)).to(token.device).float() + 0.5) * 2.0**-32
    return u.clamp(max=1 - 2.0**-24)


if triton is None:
    uniform_triton = advance = None
else:

    @triton.jit
    def uniform_triton(rng, row, token):
        """`uniform` in a kernel."""
        offset = tl.load(rng + 1)
        zero = token * 0
        low = (offset & 0xFFFFFFFF).to(tl.uint32) + zero.to(tl.uint32)
        high = (offset >> 32 & 0xFFFFFFFF).to(tl.uint32) + zero.to(tl.uint32)
        word, _, _, _ = tl.philox(tl.load(rng), token.to(tl.uint32), (row + zero).to(tl.uint32), low, high)
        return tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)

    @triton.jit
    def advance(rng, done):
        """Count a draw, when the last of program_id(0) is through."""
        rows = tl.num_programs(0)
        before = 0
        if rows > 1:
            before = tl.atomic_add(done, 1, sem="acq_rel")
        if before == rows - 1:
            tl.store(done, 0)
            tl.store(rng + 1, tl.load(rng + 1) + 1)
