"""Rotary positions (Su et al., arXiv:2104.09864) on interleaved pairs, plain and inside kernels."""

import torch
from torch import Tensor

from ops.common import tl, triton


def rotate(x: Tensor, positions: Tensor, rope: Tensor) -> Tensor:
    """RoPE on interleaved pairs (2i, 2i + 1) of x (B, S, heads, D) at positions (B, S); rope (P, R/2, 2) of (cos, sin).

    Rotates the first R dimensions and passes the rest (Su et al., arXiv:2104.09864, in gpt-fast's pairing).
    """
    turns = torch.view_as_complex(rope[positions.clamp(max=rope.shape[0] - 1)]).unsqueeze(2)  # (B, S, 1, R/2)
    rotary = 2 * rope.shape[1]
    pairs = torch.view_as_complex(x[..., :rotary].float().unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)
    return turned if rotary == x.shape[-1] else torch.cat((turned, x[..., rotary:]), dim=-1)


if triton is None:
    gains = turns = turned = None
else:

    @triton.jit
    def turns(rope, positions, max_position, DP: tl.constexpr, ROTARY: tl.constexpr):
        """Cosines and sines, interleaved, of `positions` (R,): (R, DP), if there is a table."""
        d = tl.arange(0, DP)[None, :]
        turns = 0.0
        if rope is not None:
            at = tl.minimum(positions, max_position)[:, None] * ROTARY + d
            turns = tl.load(rope + at, mask=d < ROTARY, other=0.0)
        return turns

    @triton.jit
    def gains(norm, D: tl.constexpr, DP: tl.constexpr):
        """A norm's gain (1, DP), if there is a norm."""
        d = tl.arange(0, DP)[None, :]
        gain = 1.0
        if norm is not None:
            gain = tl.load(norm + d, mask=d < D, other=0.0).to(tl.float32)
        return gain

    @triton.jit
    def turned(
        heads, turns, gain, eps, D: tl.constexpr, DP: tl.constexpr, ROTARY: tl.constexpr, NORM: tl.constexpr
    ):  # fmt: skip
        """Heads (R, DP), zeros past D, normalised if asked and rotated."""
        d = tl.arange(0, DP)[None, :]
        x = heads.to(tl.float32)
        if NORM:
            x = (x * tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None] * gain).to(heads.dtype).to(tl.float32)
        if ROTARY:
            even, odd = tl.split(x.reshape(x.shape[0], DP // 2, 2))
            cos, sin = tl.split(turns.reshape(x.shape[0], DP // 2, 2))
            turned = tl.join(even * cos - odd * sin, odd * cos + even * sin).reshape(x.shape[0], DP)
            x = tl.where(d < ROTARY, turned, x)
        return x.to(heads.dtype)
