"""Mixture of experts for more rows than a decode step has, on an NVIDIA GPU: tokens grouped by expert, no word to the
host.

    run(layer, x, norm, residual)   the backend of experts.py
    group(index, n, rows)           the order that puts tokens of one expert side by side, and tiles of it
    product(x, weight, ...)         gate and up, with SwiGLU, or down, of all experts, in one GEMM in Triton

A tile of the result belongs to one expert, and reads its tokens' rows of x where they are. How many tiles there are is
known on the GPU alone: as many programs start as there may be, and those without work end at once. Quantised weights
are widened in registers, as in linear_gemm.py, whose order of x they want.

Axes: P = M k rows of the result, a token and one of its k experts each; the others are those of linear_gemm.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops import tuning
from ops.common import on_triton, op, pdl, tl, triton
from ops.linear_gemm import assembly, places, rms_norm, values, weights
from ops.linear_triton import kind_of, out_features

FEATURES = 1024  # of a row, that a program sums

if triton is not None:

    @triton.jit
    def _grouped_kernel(
        y, x, w, s, bias, scores, order, tiles, N, K, width, k,
        KIND: tl.constexpr, GROUP: tl.constexpr, DOWN: tl.constexpr, O: tl.constexpr, BM: tl.constexpr,
        R: tl.constexpr, C: tl.constexpr, W: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr,
    ):  # fmt: skip
        """Up: y (P, width of the next x) = SwiGLU of W x [+ bias], times scores (P,), a row for each place in `order`,
        in the order of slots O wants. DOWN: y (P, N) = W x [+ scores * bias], a row for each token and choice.
        tiles int32 (T, 3): the expert, the first place, and the end of that expert's places."""
        P: tl.constexpr = 16 if KIND == "int4" else 8
        BN: tl.constexpr = 16 * W * R
        BK: tl.constexpr = C * (32 if KIND == "fp" else 8 * P)
        tile, t = tl.program_id(0), tl.program_id(1)
        expert = tl.load(tiles + t * 3).to(tl.int64)
        first, end = tl.load(tiles + t * 3 + 1), tl.load(tiles + t * 3 + 2)
        if first >= end:
            return
        m = first + tl.arange(0, BM)
        place = tl.load(order + m, m < end, other=0)  # a token's number times k, and the choice
        row = m if DOWN else place // k
        at_x = tl.where(m < end, row, 0).to(tl.int64)[:, None] * width + tl.arange(0, BK)[None, :]
        n = tile * BN + tl.arange(0, BN)
        if KIND == "fp":
            at_w = (expert * N + tl.minimum(n, N - 1))[:, None] * K + tl.arange(0, BK)[None, :]
        else:
            words, pairs = places(tile, N, K, KIND, GROUP, R, C, W)
            if KIND == "int4":
                blocks = tl.cdiv(K, 128) if GROUP < 256 else tl.cdiv(K, 256) * 2
                words += expert * (N // 8) * (blocks * 128)
                pairs += expert * (N // 8) * (tl.cdiv(K, 256) * (8 * 256 // GROUP))
            else:
                words += expert * N * (K // 4)
        acc = tl.zeros((BN, BM), tl.float32)
        for step in range(tl.cdiv(K, BK)):
            within = step * BK + tl.arange(0, BK)
            if EVEN:
                rows = tl.load(x + at_x + step * BK)
            else:
                rows = tl.load(x + at_x + step * BK, (within < width)[None, :], other=0.0)
            if KIND == "fp":
                if EVEN:
                    a = tl.load(w + at_w + step * BK)
                else:
                    a = tl.load(w + at_w + step * BK, (within < K)[None, :], other=0.0)
            else:
                found, own = weights(w, s, words, pairs, step, K, KIND, GROUP, R, C, W, EVEN)
                a = values(found, own, KIND, x.dtype.element_ty, ASM)
                a = a.reshape(C, R, 2, W, 8, 4, P, 2).permute(1, 3, 2, 4, 0, 6, 5, 7).reshape(BN, BK)
            acc = tl.dot(a, tl.trans(rows), acc)
        if KIND == "int8" or KIND == "fp8":
            scale = tl.load(s + expert * N + n, n < N, other=0.0).to(tl.float32)
            if KIND == "int8" and ASM is not None:
                scale *= 64.0
            acc *= scale[:, None]
        score = tl.load(scores + place, m < end, other=0.0)
        if bias is not None:
            shift = tl.load(bias + expert * N + n, n < N, other=0.0).to(tl.float32)[:, None]
            acc += shift * score[None, :] if DOWN else shift
        stored = (m < end)[None, :]
        if DOWN:
            at = place.to(tl.int64)[None, :] * N + n[:, None]
            tl.store(y + at, acc.to(y.dtype.element_ty), stored & (n < N)[:, None])
        else:
            gate, up = tl.split(acc.reshape(BN // 16, 2, 8, BM).permute(0, 2, 3, 1))
            out = (gate * up / (1 + tl.exp(-gate))).reshape(BN // 2, BM) * score[None, :]
            n = tile * (BN // 2) + tl.arange(0, BN // 2)
            slot = n
            if O > 0:  # see linear_gemm.py's _norm_kernel
                slot = n // (8 * O) * (8 * O) + n // 2 % O * 8 + n // (2 * O) % 4 * 2 + n % 2
            at = m.to(tl.int64)[None, :] * tl.cdiv(N // 2, 64) * 64 + slot[:, None]
            tl.store(y + at, out.to(y.dtype.element_ty), stored & (n < N // 2)[:, None])

    @triton.jit
    def _sum_kernel(out, y, residual, N, k, BLOCK: tl.constexpr):
        """out (M, N) = [residual +] the sum of a row's k rows of y (M k, N)."""
        m = tl.program_id(0).to(tl.int64)
        n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for i in range(k):
            total += tl.load(y + (m * k + i) * N + n, n < N, other=0.0).to(tl.float32)
        if residual is not None:
            total += tl.load(residual + m * N + n, n < N, other=0.0).to(tl.float32)
        tl.store(out + m * N + n, total.to(out.dtype.element_ty), n < N)


def choose(h: Tensor, gate: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """See experts.route."""
    weights, index = F.linear(h.float(), gate.float()).softmax(-1).topk(top_k, -1)
    return index, weights / weights.sum(-1, keepdim=True) if renormalize else weights


def group(index: Tensor, n: int, rows: int) -> tuple[Tensor, Tensor]:
    """Of index (M, k), which of n experts each token meets: the order int32 (P,) that puts places in it by expert, and
    tiles int32 (T, 3) of at most so many rows of that order: the expert, the first one, and the end of its rows. T is
    as many as there may be; those there are not are empty."""
    found, order = index.flatten().sort(stable=True)
    bounds = torch.searchsorted(found, torch.arange(n + 1, device=index.device))
    parts = (bounds.diff() + rows - 1) // rows
    ends = parts.cumsum(0)
    tile = torch.arange(len(found) // rows + min(n, len(found)), device=index.device)
    expert = torch.searchsorted(ends, tile, right=True).clamp(max=n - 1)
    first = bounds[expert] + (tile - ends[expert] + parts[expert]) * rows
    return order.int(), torch.stack((expert, first, bounds[expert + 1]), 1).int()


def product(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    n: int,
    scores: Tensor,
    order: Tensor,
    tiles: Tensor,
    how: tuning.Tile,
    down: bool,
) -> Tensor:
    """One product of n experts. Up: x (M, K') in the order of slots -> SwiGLU of W x [+ bias], times scores (M, k), in
    that order (P, K'). Down: of these -> W x [+ scores * bias] (P, N). See `group`, whose tiles have how.rows rows."""
    P, N, kind = len(order), out_features(weight) // n, kind_of(weight)
    K = weight.shape[1] if kind != "int4" else x.shape[1]
    R, C, W = how.row_repeat, how.k_repeat, how.num_warps
    BN, BK = 16 * W * R, C * tuning.CHUNK[kind]
    width = N if down else triton.cdiv(N // 2, 64) * 64
    y = (torch.empty if down or width == N // 2 else torch.zeros)(P, width, dtype=x.dtype, device=x.device)
    hopper = pdl(x.device)["PDL"]
    _grouped_kernel[(triton.cdiv(N, BN), len(tiles))](
        y, x, weight if kind == "fp" else weight.view(torch.int32), scales, bias, scores, order, tiles,
        N, K, x.shape[1], scores.shape[1],
        KIND=kind, GROUP=256 // scales.shape[-1] if kind == "int4" else 0, DOWN=down,
        O={"fp": 0, "int4": 4}.get(kind, 8), BM=how.rows, R=R, C=C, W=W,
        EVEN=K % BK == 0, ASM=assembly(kind, x.dtype, hopper) if kind != "fp" else None,
        num_warps=W, num_stages=how.num_stages,
    )  # fmt: skip
    return y


@op("mixture_many")
def mixture_many(
    x: Tensor,
    norm: Tensor,
    eps: float,
    gate: Tensor,
    top_k: int,
    renormalize: bool,
    up: Tensor,
    up_scales: Tensor | None,
    up_bias: Tensor | None,
    down: Tensor,
    down_scales: Tensor | None,
    down_bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """[residual +] the mixture of rms_norm(x): x (M, C) -> (M, C). Weights are those of experts_triton.experts."""
    (M, C), E, kind = x.shape, len(gate), kind_of(up)
    h = rms_norm(x, norm, eps)
    index, scores = choose(h, gate, top_k, renormalize)
    hows = [tuning.grouped(kind_of(w), out_features(w) // E, M * top_k // E, x.device) for w in (up, down)]
    order, tiles = group(index, E, hows[0].rows)
    if kind != "fp":
        h = rms_norm(x, norm, eps, kind, x.new_empty(M, triton.cdiv(C, 64) * 64))
    hidden = product(h, up, up_scales, up_bias, E, scores, order, tiles, hows[0], False)
    if hows[1].rows != hows[0].rows:
        order, tiles = group(index, E, hows[1].rows)
    y = product(hidden, down, down_scales, down_bias, E, scores, order, tiles, hows[1], True)
    out = torch.empty_like(x)
    _sum_kernel[(M, triton.cdiv(C, FEATURES))](out, y, residual, C, top_k, BLOCK=FEATURES, num_warps=4)
    return out


@torch.library.register_fake("gptfast::mixture_many")
def _(x, norm, eps, gate, top_k, renormalize, up, up_scales, up_bias, down, down_scales, down_bias, residual):
    return torch.empty_like(x)


def run(layer, x: Tensor, norm: nn.RMSNorm, residual: Tensor | None) -> Tensor | None:
    """This rank's result, for any number of rows of x on a GPU."""
    if not on_triton(x) or x.element_size() != 2:
        return None
    rows, up, down = x.reshape(-1, x.shape[-1]).contiguous(), layer.cond_ffn.w13, layer.cond_ffn.w2
    residual = None if residual is None else residual.reshape(rows.shape).contiguous()
    weights = (up.weight, up.scales, up.bias, down.weight, down.scales, down.bias)
    how = (layer.gate.weight, layer.top_k, layer.renormalize)
    return mixture_many(rows, norm.weight, norm.eps, *how, *weights, residual).view(x.shape)
