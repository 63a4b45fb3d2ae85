"""Tiles whose lanes Triton hands out as the tensor cores' fragments want them.

Axes: j and i are a warp's 4 x 8 lanes, W warps, R and C repetitions, u a lane's neighbouring elements.
"""

from ops.common import tl, triton

if triton is None:
    flat = unflat = None
else:

    @triton.jit
    def flat(x, W: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
        """Offsets or a mask of axes (j i W R C u) as (C R W i j, u), of which a load gives each lane what lies along u.

        Triton hands out lanes, then warps, to the axes of a load in order of their contiguity. Where axes tie, 3.6
        begins with the first one and 3.7 with the last one; two axes leave no choice, and the lanes become j and i, the
        warps W. Along u, offsets have to be neighbours from a multiple of u's size on, and a mask the same, as Triton
        does not see through the reshape.
        """
        U: tl.constexpr = x.shape[5]
        x = tl.broadcast_to(x, (4, 8, W, R, C, U)).permute(4, 3, 2, 1, 0, 5).reshape(32 * W * R * C, U)
        if x.dtype == tl.int1:
            x = tl.max_constancy(x, (1, U))
        else:
            x = tl.max_contiguous(tl.multiple_of(x, (1, U)), (1, U))
        return x

    @triton.jit
    def unflat(x, W: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
        """The inverse of flat, for what has been loaded."""
        return x.reshape(C, R, W, 8, 4, x.shape[1]).permute(4, 3, 2, 1, 0, 5)
