"""Linear layers for every kind of weight, behind one signature: y = [residual +] W norm(x) [+ bias].

A few rows (decoding) on an NVIDIA GPU go to the fused kernels; everything else is plain PyTorch: dequantise, then multiply.
Weights on disk: int8 and fp8 carry one scale per output row; int4 is `weight` uint8 (N, K/2), low nibble first, with
`scales` and `zeros` (N, K/G): w = (q - 8) * scale + zero.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import kernels


class Linear(nn.Module):
    """A linear layer with a bf16, fp16 or fp32 weight (N, K), and the base of the quantised ones.

    `norm` is an RMSNorm to apply to x first, `residual` a tensor to add to the result: a kernel does both on the way.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    scales: Tensor | None = None
    zeros: Tensor | None = None

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight as the matrix (N, K) it stands for."""
        return self.weight.to(dtype)

    def matmul(self, x: Tensor) -> Tensor:
        """W x for x (..., K), in plain PyTorch."""
        return F.linear(x, self.dequantized(x.dtype))

    def pack(self) -> None:
        """Lay the weight out for the device it is on. Called once, after loading."""

    def forward(self, x: Tensor, norm=None, residual: Tensor | None = None, fp32: bool = False) -> Tensor:
        """x (..., K) -> (..., N) in x's dtype, or fp32 if asked."""
        if kernels.fits(x):
            out = kernels.linear(
                x.flatten(0, -2),
                self.weight,
                self.scales,
                self.zeros,
                bias=self.bias,
                norm=None if norm is None else norm.weight,
                eps=0.0 if norm is None else norm.eps,
                residual=None if residual is None else residual.flatten(0, -2),
                out_dtype=torch.float32 if fp32 else x.dtype,
            )
            return out.view(*x.shape[:-1], self.out_features)
        y = self.matmul(x if norm is None else norm(x))
        if self.bias is not None:
            y = y + self.bias
        if residual is not None:
            y = residual + y
        return y.float() if fp32 else y


def gated(w1: Linear, w3: Linear, x: Tensor, norm) -> Tensor:
    """silu(w1 norm(x)) * (w3 norm(x)) for x (..., K)."""
    if kernels.fits(x) and w1.bias is None:
        out = kernels.gated_linear(
            x.flatten(0, -2),
            w1.weight,
            w3.weight,
            w1.scales,
            w3.scales,
            w1.zeros,
            w3.zeros,
            norm=norm.weight,
            eps=norm.eps,
        )
        return out.view(*x.shape[:-1], w1.out_features)
    x = norm(x)
    return F.silu(w1(x)) * w3(x)
