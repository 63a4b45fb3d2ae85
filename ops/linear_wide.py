"""Linear layers for more rows than a decode step has (17 and more) on an NVIDIA GPU.

    run(layer, x, norm, residual)   the backend of linear.py
    linear_many(x, weight, ...)     [residual +] W rms_norm(x) [+ bias], or SwiGLU of it, as an op: by linear_gemm.py's
                                    GEMM up to some hundred rows, beyond by `wide`
    wide(x, weight, ...)            the same by cuBLAS: weights are widened piece by piece, each by one kernel into the
                                    same memory; two more kernels make the norm before, and the rest after the product
    widen(weight, ...)              some rows of a weight, as the matrix that they stand for
    reference                       linear.py's `plain`

One op makes the choice, so that torch.compile sees no number of rows. See linear_triton.py for the layouts of weights,
and linear_gemm.py for axes.
"""

import functools

import torch
from torch import Tensor, nn

from ops import tuning
from ops.common import is_hopper, on_triton, op, pdl, tl, tlx, triton
from ops.linear_gemm import assembly, gemm, places, rms_norm, values, weights
from ops.linear_triton import group_of, kind_of, out_features

# Rows up to which the GEMM is faster than cuBLAS: of quantised weights, which it reads once and widens in each program;
# of int8, which it does not widen, up to DEEP features, beyond which it makes x fixed point for longer; and of plain
# ones, where launches around cuBLAS's are saved. Measured on an H200.
GEMM_ROWS, GEMM_ROWS_PLAIN = 256, 64
GEMM_ROWS_INT8, GEMM_ROWS_INT8_DEEP, DEEP = 2048, 1024, 8192
PIECE = 2**26  # weights widened at a time, 128 MB: products of few rows of W leave processors idle
FEATURES = 1024  # of a row, that a program finishes

if triton is not None:

    @triton.jit(do_not_specialize=["first", "end"])
    def _widen_kernel(
        out, w, s, first, end, N, K, KIND: tl.constexpr, GROUP: tl.constexpr, PAIRS: tl.constexpr, C: tl.constexpr,
        W: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """out (rows, K) = rows first to end of W; first is a multiple of a tile's 16 W rows."""
        FOUR: tl.constexpr = KIND == "int4" or KIND == "mxfp4"
        P: tl.constexpr = 16 if FOUR else 8
        BN: tl.constexpr = 16 * W
        BK: tl.constexpr = C * 8 * P
        DTYPE: tl.constexpr = out.dtype.element_ty
        S: tl.constexpr = s.dtype.element_ty if GROUP > 0 else None
        tile, step = first // BN + tl.program_id(1), tl.program_id(0)
        if PDL:
            tlx.gdc_launch_dependents()
        words, pairs = places(tile * BN, N, K, KIND, GROUP, 1, C, W)
        found, own = weights(w, s, words, pairs, step, K, KIND, GROUP, PAIRS, 1, C, W, EVEN)
        a = values(found, own, KIND, GROUP, PAIRS, S, DTYPE, ASM)
        if FOUR:  # a lane's words are 8 of 32 values
            a = a.reshape(C, 2, W, 8, 4, 4, 4, 2).permute(2, 1, 3, 0, 5, 4, 6, 7).reshape(BN, BK)
        else:
            a = a.reshape(C, 2, W, 8, 4, P, 2).permute(2, 1, 3, 0, 4, 5, 6).reshape(BN, BK)
        n, k = tile * BN + tl.arange(0, BN), step * BK + tl.arange(0, BK)
        unit = 1.0
        if KIND == "int8" and ASM is not None:
            unit = 64.0
        if GROUP == 0:
            scale = tl.load(s + n, n < N, other=0.0).to(tl.float32) * unit
            a = (a.to(tl.float32) * scale[:, None]).to(DTYPE)
        elif KIND == "int8" and ASM is not None:
            a *= 64.0
        at = (n - first).to(tl.int64)[:, None] * K + k[None, :]
        if PDL:  # the memory may still be in use
            tlx.gdc_wait()
        if EVEN:
            tl.store(out + at, a, (n < end)[:, None])
        else:
            tl.store(out + at, a, (n < end)[:, None] & (k < K)[None, :])

    @triton.jit
    def _finish_kernel(out, y, bias, residual, N, SWIGLU: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
        """out (M, N) = [residual +] y (M, N) [+ bias], or if SWIGLU `swiglu` of it (M, N / 2); may be y itself."""
        if PDL:
            tlx.gdc_launch_dependents()
            tlx.gdc_wait()
        outputs = N
        if SWIGLU:
            outputs = N // 2
        row = tl.program_id(0).to(tl.int64)
        n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        col = n
        if SWIGLU:
            col = n // 8 * 16 + n % 8
        v = tl.load(y + row * N + col, n < outputs, other=0.0).to(tl.float32)
        if bias is not None:
            v += tl.load(bias + col, n < outputs, other=0.0).to(tl.float32)
        if SWIGLU:
            up = tl.load(y + row * N + col + 8, n < outputs, other=0.0).to(tl.float32)
            if bias is not None:
                up += tl.load(bias + col + 8, n < outputs, other=0.0).to(tl.float32)
            v = v * up / (1 + tl.exp(-v))
        if residual is not None:
            v += tl.load(residual + row * outputs + n, n < outputs, other=0.0).to(tl.float32)
        tl.store(out + row * outputs + n, v.to(out.dtype.element_ty), n < outputs)


@functools.cache
def _scratch(device: torch.device, dtype: torch.dtype, n: int) -> Tensor:
    """Memory for n widened weights, all layers'. One stream of a device may use it at a time."""
    return torch.empty(n, dtype=dtype, device=device)


def widen(weight: Tensor, scales: Tensor, first: int, end: int, out: Tensor) -> Tensor:
    """Rows first to end of a packed weight (N, K), as out (end - first, K) has them; first divides by 128."""
    N, K, kind = out_features(weight), out.shape[1], kind_of(weight)
    group, pairs = group_of(K, kind, scales)
    W, C = (8, 1) if kind in ("int4", "mxfp4") else (4, 4)  # warps along rows, chunks along K: measured on an H200
    BN, BK = 16 * W, C * tuning.CHUNK[kind]
    _widen_kernel[(triton.cdiv(K, BK), triton.cdiv(end - first, BN))](
        out, weight.view(torch.int32), scales, first, end, N, K,
        KIND=kind, GROUP=group, PAIRS=pairs, C=C, W=W, EVEN=K % BK == 0, num_warps=W, num_stages=1,
        ASM=assembly(kind, scales.dtype, out.dtype, is_hopper(out.device)), **pdl(out.device),
    )  # fmt: skip
    return out


def wide(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    residual: Tensor | None,
    out_dtype: torch.dtype,
    swiglu: bool,
) -> Tensor:
    """[residual +] W rms_norm(x) [+ bias]: x (M, K) -> (M, N) in `out_dtype`; with `swiglu`, SwiGLU of it
    (M, N / 2)."""
    (M, K), N = x.shape, out_features(weight)
    if norm is not None:
        x = rms_norm(x, norm, eps)
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    if scales is None:
        torch.mm(x, weight.t(), out=y)
    else:
        pieces = triton.cdiv(N * K, PIECE)  # of one size
        rows = triton.cdiv(N, pieces * 256) * 256
        scratch = _scratch(x.device, x.dtype, triton.next_power_of_2(rows * K))
        for first in range(0, N, rows):
            end = min(first + rows, N)
            matrix = widen(weight, scales, first, end, scratch[: (end - first) * K].view(-1, K))
            torch.mm(x, matrix.t(), out=y[:, first:end])
    if bias is None and residual is None and not swiglu:
        return y.to(out_dtype)
    outputs = N // 2 if swiglu else N
    out = y if not swiglu and out_dtype == y.dtype else torch.empty(M, outputs, dtype=out_dtype, device=x.device)
    _finish_kernel[(M, triton.cdiv(outputs, FEATURES))](
        out, y, bias, residual, N, SWIGLU=swiglu, BLOCK=FEATURES, num_warps=4, **pdl(x.device)
    )
    return out


def gemm_rows(weight: Tensor, scales: Tensor | None) -> int:
    """The most rows of x for which a weight is the GEMM's."""
    if scales is None:
        return GEMM_ROWS_PLAIN
    if weight.dtype is not torch.int8 or scales.ndim > 1:
        return GEMM_ROWS
    return GEMM_ROWS_INT8 if weight.shape[1] <= DEEP else GEMM_ROWS_INT8_DEEP


@op("linear_many")
def linear_many(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    residual: Tensor | None,
    out_dtype: torch.dtype,
    swiglu: bool,
) -> Tensor:
    """[residual +] W rms_norm(x) [+ bias]: x (..., K) -> (..., N) in `out_dtype`; with `swiglu`, SwiGLU of it
    (..., N / 2). Residual like the result; the rest as of linear_triton.linear."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    residual = None if residual is None else residual.contiguous()
    y = (gemm if len(rows) <= gemm_rows(weight, scales) else wide)(
        rows, weight, scales, bias, norm, eps, residual, out_dtype, swiglu
    )
    return y.view(*x.shape[:-1], y.shape[1])


@torch.library.register_fake("gptfast::linear_many")
def _(x, weight, scales, bias, norm, eps, residual, out_dtype, swiglu):
    return x.new_empty((*x.shape[:-1], out_features(weight) // (2 if swiglu else 1)), dtype=out_dtype)


def run(layer, x: Tensor, norm: nn.RMSNorm | None, residual: Tensor | None) -> Tensor | None:
    """This rank's result, for any number of rows of x on a GPU."""
    if not on_triton(x) or x.element_size() != 2:
        return None
    gain, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    dtype = torch.float32 if layer.fp32 else x.dtype
    return linear_many(x, layer.weight, layer.scales, layer.bias, gain, eps, residual, dtype, layer.swiglu)
