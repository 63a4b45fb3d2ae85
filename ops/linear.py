"""Linear layers: y = [residual +] W rms_norm(x) [+ bias], or SwiGLU of it, for every kind of weight, over all ranks.

    linear(layer, x, norm, residual)   by the first of the layer's backends that supports these rows
    prepare(layer, dtype)              lay a weight out for its device, and choose the backends that support it

Backends: the Triton kernel for up to 16 rows on an NVIDIA GPU; for more rows there linear_many, which reads a weight
that is packed for that kernel; cpu.py's on a CPU, but where PyTorch multiplies many rows of bf16 faster; on a CPU that
has no arithmetic in 16 bits, plain PyTorch in fp32; plain PyTorch, which runs everywhere and is the reference.
"""

from collections.abc import Callable
from functools import wraps
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops import cpu, linear_triton, linear_wide, symmetric
from ops.packing import dequantize
from ops.rms_norm import normed

PIECE = 2**20  # weights widened to fp32 at a time: fresh memory for all of an output layer is slow
FEW_ROWS = 6  # for which widening a weight to fp32 costs more than it gains


class LinearLayer(Protocol):
    """What a backend reads of a layer. Weights are as linear.py has them on disk, or as `prepare` leaves them."""

    weight: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    bias: Tensor | None
    in_features: int
    out_features: int
    fp32: bool  # the result's dtype, else x's
    swiglu: bool  # rows of W are gate's and up's, interleaved by 8: the result is SwiGLU (..., N / 2)
    reduce: str  # what ranks make of their results: "", "sum" or "gather"
    rank: int
    world: int
    backends: tuple[Callable, ...]


def prepare(layer: LinearLayer, dtype: torch.dtype) -> None:
    """Called once, after loading: `dtype` is that of activations."""
    if layer.weight.is_cpu and layer.scales is not None:
        if layer.weight.dtype is torch.float8_e4m3fn or layer.scales.dtype is torch.uint8:  # what cpu.cpp does not read
            wide = dequantize(layer.weight, layer.scales, layer.zeros, dtype)[:, : layer.in_features].contiguous()
            layer.weight, layer.scales, layer.zeros = nn.Parameter(wide, requires_grad=False), None, None
        elif layer.scales.ndim == 2:
            cpu.narrow_scales(layer)
    layer.backends = tuple(run for supports, run in BACKENDS if supports(layer, dtype))


def linear(layer: LinearLayer, x: Tensor, norm: nn.RMSNorm | None = None, residual: Tensor | None = None) -> Tensor:
    """x (..., K) -> (..., N) in x's dtype or fp32. norm: an RMSNorm to apply to x first; residual: what to add to the
    result. A kernel does both on the way."""
    if norm is not None and norm.weight.dtype is not x.dtype:  # fp32 gains, which bf16 would round
        x, norm = normed(x, norm.weight, norm.eps), None
    for run in layer.backends:
        y = run(layer, x, norm, residual)
        if y is not None:
            return y
    raise AssertionError("plain PyTorch supports everything")


def swiglu(y: Tensor) -> Tensor:
    """silu(gate) * up (..., N / 2) of y (..., N), whose features are gate's and up's, interleaved by 8 (arXiv
    2002.05202)."""
    gate, up = y.unflatten(-1, (-1, 2, 8)).unbind(-2)
    return (F.silu(gate) * up).flatten(-2)


def _over_ranks(run: Callable) -> Callable:
    """A backend that knows of no ranks, and what all of them make together. (Of a bias, rank 0's share of a sum has
    all, by Linear.shard.)"""

    @wraps(run)
    def over_ranks(layer: LinearLayer, x: Tensor, norm, residual: Tensor | None) -> Tensor | None:
        alone = layer.world == 1 or not layer.reduce
        y = run(layer, x, norm, residual if alone else None)
        if y is None or alone:
            return y
        return symmetric.all_reduce(y, layer.reduce == "gather", layer.rank, layer.world, residual)

    return over_ranks


@_over_ranks
def _cpu(layer, x, norm, residual):
    if layer.scales is None and x.numel() > cpu.most_rows(x.dtype) * x.shape[-1]:
        return None
    gain, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    weight = (layer.weight, layer.scales, layer.zeros, layer.bias)
    return cpu.linear(x, *weight, gain, eps, residual, layer.out_features, layer.fp32, layer.swiglu)


@_over_ranks
def _widened(layer, x, norm, residual):
    if x.numel() <= FEW_ROWS * x.shape[-1]:
        return None
    h = x if norm is None else norm(x)
    pieces = _matrix(layer, x.dtype).split(max(1, PIECE // layer.in_features))
    return _finish(layer, torch.cat([F.linear(h.float(), piece.float()) for piece in pieces], -1).to(x.dtype), residual)


@_over_ranks
def plain(layer, x, norm=None, residual=None):
    """The reference, which supports everything."""
    return _finish(layer, F.linear(x if norm is None else norm(x), _matrix(layer, x.dtype)), residual)


def _matrix(layer: LinearLayer, dtype: torch.dtype) -> Tensor:
    return dequantize(layer.weight, layer.scales, layer.zeros, dtype)[: layer.out_features, : layer.in_features]


def _finish(layer: LinearLayer, y: Tensor, residual: Tensor | None) -> Tensor:
    if layer.bias is not None:
        y = y + layer.bias
    if layer.swiglu:
        y = swiglu(y)
    if residual is not None:
        y = residual + y
    return y.float() if layer.fp32 else y


def half_is_slow(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether fp32 multiplies faster than `dtype`: half precision on an x86 CPU without AVX-512."""
    if not weight.is_cpu or dtype.itemsize != 2 or not torch.backends.mkldnn.is_available():
        return False
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


BACKENDS = (
    (linear_triton.pack, linear_triton.run),
    (linear_triton.pack, _over_ranks(linear_wide.run)),
    (cpu.pack, _cpu),
    (lambda layer, dtype: half_is_slow(layer.weight, dtype), _widened),
    (lambda layer, dtype: True, plain),
)
