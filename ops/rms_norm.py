"""RMSNorm in plain PyTorch, the reference of the kernels that fuse it."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) [* weight] over the last axis, in fp32 (Zhang and Sennrich, arXiv:1910.07467)."""
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return (normed if weight is None else normed * weight.float()).to(x.dtype)
