"""Mixture of experts (arXiv 1701.06538): [residual +] the weighted sum of the few feed-forwards that each token meets.

    mixture(layer, x, norm, residual)   by the first of the layer's backends that supports these rows
    prepare(layer, dtype)               lay the experts' weights out for their device, and choose the backends
    route(layer, h)                     which experts each token meets, and their weights

Routing is a softmax over all experts, of which the top k count, renormalised or not. (Renormalised, that is the softmax
of the top k logits, as some families have it.) It is done in fp32.

Backends: for up to 16 rows on an NVIDIA GPU two launches that read the chosen experts alone (experts_triton.py); for
more rows there tokens grouped by expert (experts_gemm.py); plain PyTorch, which runs everywhere and is the reference.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops import cpu, experts_gemm, experts_triton, symmetric
from ops.common import on_triton, op
from ops.linear import BACKENDS, LinearLayer, linear, plain
from ops.linear import _cpu as on_cpu
from ops.packing import dequantize, pack_4_bits


class Experts(Protocol):
    """Gate and up as one layer with SwiGLU, or apart where they are of two kinds or have another activation. Weights
    have an axis E before N and K."""

    act: Callable[[Tensor], Tensor]
    w13: LinearLayer | None
    w1: LinearLayer | None
    w3: LinearLayer | None
    w2: LinearLayer


class MixtureLayer(Protocol):
    """What a backend reads of a layer."""

    gate: nn.Linear  # the router, (E, C) and perhaps a bias
    cond_ffn: Experts
    top_k: int
    renormalize: bool
    limit: float  # of what `glu` multiplies, 0 where there is none
    alpha: float
    rank: int
    world: int
    backends: tuple[Callable, ...]  # before plain PyTorch


@dataclass
class Expert:
    """One of a layer's experts: a LinearLayer of ops/linear.py that knows of no ranks."""

    weight: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    bias: Tensor | None
    in_features: int
    out_features: int
    swiglu: bool = False
    fp32: bool = False
    reduce: str = ""
    rank: int = 0
    world: int = 1
    backends: tuple[Callable, ...] = (plain,)


def prepare(layer: MixtureLayer, dtype: torch.dtype) -> None:
    """Called once, after loading: `dtype` is that of activations."""
    experts = layer.cond_ffn
    for own in (experts.w13, experts.w1, experts.w3, experts.w2):
        if own is not None and own.weight.is_cpu and own.weight.dtype is torch.float8_e4m3fn:  # see linear.prepare
            wide = dequantize(own.weight, own.scales, None, dtype)
            own.weight, own.scales = nn.Parameter(wide, requires_grad=False), None
        elif own is not None and own.weight.is_cpu and own.scales is not None:
            if own.scales.ndim == 3 and own.zeros is not None:
                cpu.narrow_scales(own)
            _pack_on_cpu(own, dtype)
    layer.backends = (experts_triton.run, experts_gemm.run) if pack(layer, dtype) else ()


def _pack_on_cpu(layer: LinearLayer, dtype: torch.dtype) -> None:
    """Lay each expert's integer weight out for the CPU's kernels, if they support it."""
    parts = [
        _expert(layer.weight, layer.scales, layer.zeros, None, e, layer.in_features, layer.out_features)
        for e in range(len(layer.weight))
    ]
    if all(cpu.pack(part, dtype) for part in parts):
        for key in ("weight", "scales", "zeros"):
            own = [getattr(part, key) for part in parts]
            setattr(layer, key, None if own[0] is None else nn.Parameter(torch.stack(own), requires_grad=False))


def _expert(weight, scales, zeros, bias, e: int, K: int, N: int) -> Expert:
    return Expert(*(t if t is None else t[e] for t in (weight, scales, zeros, bias)), K, N)


def pack(layer: MixtureLayer, dtype: torch.dtype) -> bool:
    """Lay experts' weights out for the kernels and activations of `dtype`, as linear_triton.pack does. Returns whether
    the kernels support them."""
    experts = [layer.cond_ffn.w13, layer.cond_ffn.w2]
    if dtype.itemsize != 2 or None in experts:
        return False
    for own in experts:
        weight, fits = own.weight, own.in_features % 32 == 0 and own.weight.shape[1] % 8 == 0
        if not (on_triton(weight) and fits and weight.dtype in (dtype, torch.int8, torch.float8_e4m3fn, torch.uint8)):
            return False
    for own in experts:
        weight, scales = own.weight.flatten(0, 1), None if own.scales is None else own.scales.flatten(0, 1)
        if weight.dtype is torch.uint8:
            weight, scales = pack_4_bits(weight, scales, None if own.zeros is None else own.zeros.flatten(0, 1))
        own.weight, own.zeros = nn.Parameter(weight, requires_grad=False), None
        own.scales = None if scales is None else nn.Parameter(scales, requires_grad=False)
    return True


def mixture(layer: MixtureLayer, x: Tensor, norm: nn.RMSNorm, residual: Tensor | None = None) -> Tensor:
    """[residual +] mixture(norm(x)) of x (..., C), in its dtype; with several ranks, which have a part of each expert
    and perhaps a residual, x plus the sum of theirs."""
    ways = (run(layer, x, norm, residual) for run in (*layer.backends, mixture_plain))
    y = next(y for y in ways if y is not None)
    return y if layer.world == 1 else symmetric.all_reduce(y, False, layer.rank, layer.world, x)


def route(layer: MixtureLayer, h: Tensor) -> tuple[Tensor, Tensor]:
    """The experts that rows h (M, C) meet, int64 (M, k), and their weights, fp32 (M, k)."""
    gate, bias = (t if t is None else t.float() for t in (layer.gate.weight, layer.gate.bias))
    weights, index = F.linear(h.float(), gate, bias).softmax(-1).topk(layer.top_k, -1)
    return index, weights / weights.sum(-1, keepdim=True) if layer.renormalize else weights


def glu(layer: MixtureLayer, gate: Tensor, up: Tensor) -> Tensor:
    """act(gate) * up or, with a limit, gate * sigmoid(alpha gate) * (up + 1) of clamped ones (gpt-oss's model card,
    arXiv 2508.10925)."""
    if not layer.limit:
        return layer.cond_ffn.act(gate) * up
    gate, up = gate.clamp(max=layer.limit), up.clamp(-layer.limit, layer.limit)
    return gate * torch.sigmoid(layer.alpha * gate) * (up + 1)


def mixture_plain(layer: MixtureLayer, x: Tensor, norm: nn.RMSNorm, residual: Tensor | None) -> Tensor:
    """The reference, which supports everything."""
    h = norm(x).flatten(0, -2)
    index, weights = route(layer, h)
    rows, experts, k = h.repeat_interleave(layer.top_k, 0), layer.cond_ffn, index.flatten()  # (M k, C)
    if experts.w13:
        gate, up = _grouped(experts.w13, rows, k).unflatten(-1, (-1, 2, 8)).unbind(-2)
        hidden = glu(layer, gate, up).flatten(-2)
    else:
        hidden = glu(layer, _grouped(experts.w1, rows, k), _grouped(experts.w3, rows, k))
    y = _grouped(experts.w2, hidden, k).view(*index.shape, -1)
    y = (y * weights[..., None]).sum(1).to(x.dtype).view(x.shape)
    return y if residual is None else residual + y


def _grouped(layer: LinearLayer, x: Tensor, index: Tensor) -> Tensor:
    weight = (layer.weight, layer.scales, layer.zeros, layer.bias)
    return grouped_linear(x, index, *weight, layer.out_features)


@op("grouped_linear")
def grouped_linear(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    bias: Tensor | None,
    N: int,
) -> Tensor:
    """Each row of x (P, K) through its expert, index (P,), of weights (E, N, K) of any kind or packed: (P, N). On a CPU
    only the experts that are met are read; elsewhere the host does not wait to know them."""
    y = x.new_empty(len(x), N)
    for e in index.unique().tolist() if x.is_cpu else range(len(weight)):
        own = _expert(weight, scales, zeros, bias, e, x.shape[1], N)
        if x.is_cpu:
            if weight.ndim > 3:  # packed
                own.backends = (on_cpu, plain)
            elif scales is None:
                own.backends = tuple(run for supports, run in BACKENDS if supports(own, x.dtype))
            rows = (index == e).nonzero()[:, 0]
            y[rows] = linear(own, x[rows])
        else:
            y = torch.where((index == e)[:, None], linear(own, x), y)
    return y


@torch.library.register_fake("gptfast::grouped_linear")
def _(x, index, weight, scales, zeros, bias, N):
    return x.new_empty(len(x), N)
