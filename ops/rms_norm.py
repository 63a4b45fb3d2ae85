"""RMSNorm by itself, where no linear layer fuses it.

    rms_norm(x, weight, eps)                the reference of the kernels that fuse it
    normed(x, weight, eps, residual=None)   [residual +] rms_norm(x), as an op
    add_norm(x, y, norm)                    x + norm(y), of blocks that have a norm behind their parts

Backends: a Triton kernel on an NVIDIA GPU, plain PyTorch.
"""

import torch
from torch import Tensor, nn

from ops.common import on_triton, op, pdl, tl, tlx, triton


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) [* weight] over the last axis, in fp32 (Zhang and Sennrich, arXiv:1910.07467)."""
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return (normed if weight is None else normed * weight.float()).to(x.dtype)


def add_norm(x: Tensor, y: Tensor, norm: nn.RMSNorm) -> Tensor:
    """x + norm(y), of x's shape and dtype."""
    return normed(y, norm.weight, norm.eps, x)


def normed(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """[residual +] rms_norm(x) (..., K); weight (K,) of any floating dtype."""
    if on_triton(x):
        return normed_triton(x, weight, eps, residual)
    y = rms_norm(x, weight, eps)
    return y if residual is None else residual + y


@op("rms_norm")
def normed_triton(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """One launch, a program a row."""
    x, K = x.contiguous(), x.shape[-1]
    out = torch.empty_like(x)
    _norm_kernel[(x.numel() // K,)](
        out, x, weight, None if residual is None else residual.contiguous(), K, eps,
        BLOCK=triton.next_power_of_2(K), num_warps=4 if K <= 4096 else 8, **pdl(x.device),
    )  # fmt: skip
    return out


@torch.library.register_fake("gptfast::rms_norm")
def _(x, weight, eps, residual=None):
    return x.new_empty(x.shape)


if triton is not None:

    @triton.jit
    def _norm_kernel(out, x, weight, residual, K, eps, BLOCK: tl.constexpr, PDL: tl.constexpr):
        k = tl.arange(0, BLOCK)
        at = tl.program_id(0).to(tl.int64) * K + k
        gain = tl.load(weight + k, k < K, other=0.0).to(tl.float32)  # before the wait: no kernel writes it
        if PDL:
            tlx.gdc_launch_dependents()
            tlx.gdc_wait()
        v = tl.load(x + at, k < K, other=0.0).to(tl.float32)
        v = v * tl.rsqrt(tl.sum(v * v, 0) / K + eps) * gain
        if residual is not None:  # which meets the norm's result in its own dtype, as in the reference
            v = v.to(out.dtype.element_ty).to(tl.float32) + tl.load(residual + at, k < K, other=0.0).to(tl.float32)
        tl.store(out + at, v.to(out.dtype.element_ty), k < K)
