"""Mixture of experts for more rows than a decode step has, on an NVIDIA GPU: tokens grouped by expert, no word to the
host.

    run(layer, x, norm, residual)   the backend of experts.py
    group(x, norm, ...)             RMSNorm, the router, and the order that puts tokens of one expert side by side
    product(x, weight, ...)         gate and up, with SwiGLU, or down, of all experts, in one GEMM in Triton

A tile of the result belongs to one expert, and reads its tokens' rows of x where they are. How many tiles there are is
known on the GPU alone: as many programs start as there may be, and those without work end at once. Quantised weights
are widened in registers, as in linear_gemm.py, whose order of x they want.

Axes: P = M k rows of the result, a token and one of its k experts each; the others are those of linear_gemm.py.
"""

import torch
from torch import Tensor, nn

from ops import tuning
from ops.common import on_triton, op, pdl, tl, triton
from ops.experts_triton import glu
from ops.linear_gemm import ORDER, assembly, places, rms_norm, settled, values, weights
from ops.linear_triton import group_of, kind_of, out_features

FEATURES = 1024  # of a row, that a program sums

if triton is not None:

    @triton.jit
    def _choose_kernel(
        index, scores, counts, h, x, gain, gate, shift, M, C, E, eps, TOP: tl.constexpr, RENORMALIZE: tl.constexpr,
        EXPERTS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
    ):  # fmt: skip
        """Of BM rows of x (M, C): h, their RMSNorm; index int32 and scores fp32 (M, TOP), the experts they meet and how
        much these count; counts int32 (blocks, EXPERTS), how many of these rows each expert gets."""
        m, e, c = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, EXPERTS), tl.arange(0, BC)
        at = m.to(tl.int64)[:, None] * C + c[None, :]
        squares = tl.zeros((BM, BC), tl.float32)
        for start in range(0, C, BC):
            rows = tl.load(x + at + start, (m < M)[:, None] & (start + c < C)[None, :], other=0.0).to(tl.float32)
            squares += rows * rows
        factor = tl.rsqrt(tl.sum(squares, 1) / C + eps)
        acc = tl.zeros((BM, EXPERTS), tl.float32)
        for start in range(0, C, BC):
            inside = (m < M)[:, None] & (start + c < C)[None, :]
            rows = tl.load(x + at + start, inside, other=0.0).to(tl.float32) * factor[:, None]
            rows *= tl.load(gain + start + c, start + c < C, other=0.0).to(tl.float32)[None, :]
            rows = rows.to(h.dtype.element_ty)
            tl.store(h + at + start, rows, inside)
            own = tl.load(
                gate + e[:, None] * C + (start + c)[None, :], (e < E)[:, None] & (start + c < C)[None, :], other=0.0
            )
            acc = tl.dot(rows, tl.trans(own), acc)
        if shift is not None:
            acc += tl.load(shift + e, e < E, other=0.0).to(tl.float32)[None, :]
        logits = tl.where((e < E)[None, :], acc, -3e38)
        p = tl.exp(logits - tl.max(logits, 1, keep_dims=True))
        total, rest, met = tl.sum(p, 1), logits, tl.zeros((BM, EXPERTS), tl.int32)
        for i in tl.static_range(TOP):
            best = tl.minimum(tl.argmax(rest, 1), E - 1)
            tl.store(index + m * TOP + i, best, m < M)
            met += (e[None, :] == best[:, None]).to(tl.int32)
            rest = tl.where(e[None, :] == best[:, None], float("-inf"), rest)
        if RENORMALIZE:
            total = tl.sum(tl.where(met > 0, p, 0.0), 1)
        rest = logits
        for i in tl.static_range(TOP):
            best = e[None, :] == tl.argmax(rest, 1, keep_dims=True)
            tl.store(scores + m * TOP + i, tl.sum(tl.where(best, p, 0.0), 1) / total, m < M)
            rest = tl.where(best, float("-inf"), rest)
        tl.store(counts + tl.program_id(0) * EXPERTS + e, tl.sum(tl.where((m < M)[:, None], met, 0), 0))

    @triton.jit
    def _place_kernel(
        order, tiles, counts, index, M, E, T, blocks, ROWS: tl.constexpr, TOP: tl.constexpr, TOP2: tl.constexpr,
        EXPERTS: tl.constexpr, BM: tl.constexpr, BB: tl.constexpr,
    ):  # fmt: skip
        """Puts a block's rows, each TOP times, at their places in `order`, by expert and then as they are; the first
        program writes the tiles of so many ROWS. See `group`."""
        block, e = tl.program_id(0), tl.arange(0, EXPERTS)
        total, before = tl.zeros((EXPERTS,), tl.int32), tl.zeros((EXPERTS,), tl.int32)
        for b in range(0, blocks, BB):
            at = b + tl.arange(0, BB)
            own = tl.load(counts + at[:, None] * EXPERTS + e[None, :], (at < blocks)[:, None], other=0)
            total += tl.sum(own, 0)
            before += tl.sum(tl.where((at < block)[:, None], own, 0), 0)
        start = tl.cumsum(total, 0) - total
        i = tl.arange(0, BM * TOP2)
        m, choice = block * BM + i // TOP2, i % TOP2
        mine = (m < M) & (choice < TOP)
        expert = tl.load(index + m * TOP + choice, mine, other=-1)
        met = (expert[:, None] == e[None, :]).to(tl.int32)
        place = tl.sum(met * ((start + before)[None, :] + tl.cumsum(met, 0) - met), 1)
        tl.store(order + place, m * TOP + choice, mine)
        if block == 0:
            parts = (total + ROWS - 1) // ROWS
            ends = tl.cumsum(parts, 0)
            for t0 in range(0, T, BB):
                t = t0 + tl.arange(0, BB)
                of = tl.minimum(tl.sum((t[:, None] >= ends[None, :]).to(tl.int32), 1), E - 1)
                here = of[:, None] == e[None, :]
                first = tl.sum(tl.where(here, (start - (ends - parts) * ROWS)[None, :], 0), 1) + t * ROWS
                end = tl.sum(tl.where(here, (start + total)[None, :], 0), 1)
                tl.store(tiles + t * 3, of, t < T)
                tl.store(tiles + t * 3 + 1, first, t < T)
                tl.store(tiles + t * 3 + 2, end, t < T)

    @triton.jit
    def _grouped_kernel(
        y, x, w, s, bias, scores, order, tiles, N, K, width, k,
        KIND: tl.constexpr, GROUP: tl.constexpr, DOWN: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr,
        O: tl.constexpr, BM: tl.constexpr, R: tl.constexpr, C: tl.constexpr, W: tl.constexpr, EVEN: tl.constexpr,
        ASM: tl.constexpr, HOPPER: tl.constexpr,
    ):  # fmt: skip
        """Up: y (P, width of the next x) = SwiGLU of W x [+ bias], times scores (P,), a row for each place in `order`,
        in the order of slots O wants. DOWN: y (P, N) = W x [+ scores * bias], a row for each token and choice.
        tiles int32 (T, 3): the expert, the first place, and the end of that expert's places."""
        FOUR: tl.constexpr = KIND == "int4" or KIND == "mxfp4"
        P: tl.constexpr = 16 if FOUR else 8
        BN: tl.constexpr = 16 * W * R
        BK: tl.constexpr = C * (32 if KIND == "fp" else 8 * P)
        S: tl.constexpr = s.dtype.element_ty if GROUP > 0 else None
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
            words, pairs = places(tile * BN, N, K, KIND, GROUP, R, C, W)
            if FOUR:
                blocks = tl.cdiv(K, 128) if GROUP < 256 else tl.cdiv(K, 256) * 2
                words += expert * (N // 8) * (blocks * 128)
                if KIND == "int4":
                    pairs += expert * (N // 8) * (tl.cdiv(K, 256) * (8 * 256 // GROUP))
                else:
                    pairs += expert * (N // 8) * (blocks * 32)
            else:
                words += expert * N * (K // 4)
        acc = tl.zeros((BN, BM), tl.float32)
        for step in range(tl.cdiv(K, BK)):
            within = step * BK + tl.arange(0, BK)
            if KIND == "fp":
                if EVEN:
                    a = tl.load(w + at_w + step * BK)
                else:
                    a = tl.load(w + at_w + step * BK, (within < K)[None, :], other=0.0)
            else:
                found, own = weights(w, s, words, pairs, step, K, KIND, GROUP, KIND == "int4", R, C, W, EVEN)
                a = values(found, own, KIND, GROUP, KIND == "int4", S, x.dtype.element_ty, ASM)
                a = a.reshape(C, R, 2, W, 8, 4, P, 2).permute(1, 3, 2, 4, 0, 6, 5, 7).reshape(BN, BK)
            if EVEN:
                rows = tl.load(x + at_x + step * BK)
            else:
                rows = tl.load(x + at_x + step * BK, (within < width)[None, :], other=0.0)
            acc = tl.dot(a, tl.trans(rows), acc)
            if HOPPER and KIND != "fp":
                acc = settled(acc)
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
            out = glu(gate, up, LIMIT, ALPHA).reshape(BN // 2, BM) * score[None, :]
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


def group(
    x: Tensor,
    norm: Tensor,
    eps: float,
    gate: Tensor,
    bias: Tensor | None,
    top_k: int,
    renormalize: bool,
    rows: int,
) -> tuple[Tensor, ...]:
    """Send rows x (M, C) to experts. Returns h, their RMSNorm; scores fp32 (M, k), see experts.route; the order int32
    (P,) that puts tokens of one expert side by side, of numbers m k + choice; and tiles int32 (T, 3) of at most so many
    rows of that order: the expert, the first place, and the end of that expert's. T is as many as there may be; those
    that there are not are empty."""
    (M, C), E, BM = x.shape, len(gate), 16
    blocks, EXPERTS = triton.cdiv(M, BM), max(16, triton.next_power_of_2(E))
    h, scores = torch.empty_like(x), torch.empty(M, top_k, dtype=torch.float32, device=x.device)
    index, order = torch.empty(2, M * top_k, dtype=torch.int32, device=x.device)
    counts = torch.empty(blocks, EXPERTS, dtype=torch.int32, device=x.device)
    _choose_kernel[(blocks,)](
        index, scores, counts, h, x, norm, gate, bias, M, C, E, eps, TOP=top_k, RENORMALIZE=renormalize,
        EXPERTS=EXPERTS, BM=BM, BC=128, num_warps=4,
    )  # fmt: skip
    tiles = torch.empty(M * top_k // rows + min(E, M * top_k), 3, dtype=torch.int32, device=x.device)
    _place_kernel[(blocks,)](
        order, tiles, counts, index, M, E, len(tiles), blocks, ROWS=rows, TOP=top_k,
        TOP2=triton.next_power_of_2(top_k), EXPERTS=EXPERTS, BM=BM, BB=64, num_warps=8,
    )  # fmt: skip
    return h, scores, order, tiles


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
    limit: float = 0.0,
    alpha: float = 1.0,
) -> Tensor:
    """One product of n experts. Up: x (M, K') in the order of slots -> SwiGLU of W x [+ bias], times scores (M, k), in
    that order (P, K'). Down: of these -> W x [+ scores * bias] (P, N). See `group`, whose tiles have how.rows rows."""
    P, N, kind = len(order), out_features(weight) // n, kind_of(weight)
    K = weight.shape[1] if weight.ndim == 2 else x.shape[1]
    R, C, W = how.row_repeat, how.k_repeat, how.num_warps
    BN, BK = 16 * W * R, C * tuning.CHUNK[kind]
    width = N if down else triton.cdiv(N // 2, 64) * 64
    y = (torch.empty if down or width == N // 2 else torch.zeros)(P, width, dtype=x.dtype, device=x.device)
    hopper = pdl(x.device)["PDL"]
    _grouped_kernel[(triton.cdiv(N, BN), len(tiles))](
        y, x, weight if kind == "fp" else weight.view(torch.int32), scales, bias, scores, order, tiles,
        N, K, x.shape[1], scores.shape[1],
        KIND=kind, GROUP=group_of(K, kind, scales)[0], DOWN=down,
        LIMIT=limit, ALPHA=alpha, O=ORDER.get(kind, 8), BM=how.rows, R=R, C=C, W=W,
        EVEN=K % BK == 0, ASM=assembly(kind, scales.dtype, x.dtype, hopper) if kind != "fp" else None,
        HOPPER=hopper, num_warps=W, num_stages=how.num_stages,
    )  # fmt: skip
    return y


@op("mixture_many")
def mixture_many(
    x: Tensor,
    norm: Tensor,
    eps: float,
    gate: Tensor,
    gate_bias: Tensor | None,
    top_k: int,
    renormalize: bool,
    limit: float,
    alpha: float,
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
    how = tuning.grouped(kind, out_features(up) // E, M * top_k // E, x.device)
    h, scores, order, tiles = group(x, norm, eps, gate, gate_bias, top_k, renormalize, how.rows)
    if kind != "fp":
        h = rms_norm(x, norm, eps, kind, x.new_empty(M, triton.cdiv(C, 64) * 64))
    hidden = product(h, up, up_scales, up_bias, E, scores, order, tiles, how, False, limit, alpha)
    y = product(hidden, down, down_scales, down_bias, E, scores, order, tiles, how, True)
    out = torch.empty_like(x)
    _sum_kernel[(M, triton.cdiv(C, FEATURES))](out, y, residual, C, top_k, BLOCK=FEATURES, num_warps=4)
    return out


@torch.library.register_fake("gptfast::mixture_many")
def _(x, *rest):
    return torch.empty_like(x)


def run(layer, x: Tensor, norm: nn.RMSNorm, residual: Tensor | None) -> Tensor | None:
    """This rank's result, for any number of rows of x on a GPU."""
    if not on_triton(x) or x.element_size() != 2:
        return None
    rows, up, down = x.reshape(-1, x.shape[-1]).contiguous(), layer.cond_ffn.w13, layer.cond_ffn.w2
    residual = None if residual is None else residual.reshape(rows.shape).contiguous()
    weights = (up.weight, up.scales, up.bias, down.weight, down.scales, down.bias)
    how = (layer.gate.weight, layer.gate.bias, layer.top_k, layer.renormalize, layer.limit, layer.alpha)
    return mixture_many(rows, norm.weight, norm.eps, *how, *weights, residual).view(x.shape)
