"""Linear layers of quantised weights for 17 to some hundred rows on an NVIDIA GPU, of int8 for some thousand: a GEMM in
Triton that reads a weight once and widens it in registers. (For plain weights cuBLAS is faster.)

    gemm(x, weight, ...)     [residual +] W rms_norm(x) [+ bias], or SwiGLU of it
    rms_norm(x, norm, ...)   RMSNorm by itself, in the order of features that `gemm` wants, or as it is
    fixed_point(x, ...)      the same as two int8 rows for each row of x
    reference                linear.py's `plain`

Weights are those of linear_triton.py, packed once for both: int8 and float8_e4m3fn (N, K), and packed int4. W is the
tensor cores' first operand, which may come from registers, x the second one, which comes from shared memory. As there,
a lane's 16 bytes of a row of W are its part of a fragment if the K axis is permuted; here x is put into that order
beforehand, together with its norm: of each 8 O features, slot (p, j, e) holds feature (j, p, e). Between a load of
weights and its MMA there are only the instructions that widen, and Triton's pipeline keeps both operands' next tiles
in flight.

int8 without groups needs not even those: x becomes fixed point of 16 bits, multiples of its row's largest value over
32,639, as two int8 rows, a high byte and a low one, whose products with W are exact and cost what bf16's do. That is
never further from x (by its norm) than rounding it to bf16 is.

Axes: M rows of x, N rows of W, K what is summed; of a tile j and i a warp's 4 x 8 lanes, h a fragment's two halves of 8
rows, W warps along rows, R and C repetitions along rows and K, u a lane's words, p of its P pairs, e their two values.
"""

import functools

import torch
from torch import Tensor

from ops import tuning, unpacking
from ops.common import counters, pdl, tl, tlx, triton
from ops.linear_triton import group_of, kind_of, out_features

ORDER = {"": 0, "fp": 0, "int4": 4, "mxfp4": 4}  # a kind's O, see above, if not 8
FEATURES = 2048  # of a row, that a program of the norm writes
WHOLE = 2**14  # of a row, that a program writes in fixed point, whose largest is needed first
TILES = 2**14  # of a result whose parts along K are summed

if triton is None:
    places = weights = values = settled = None
else:
    LARGEST = tl.constexpr(127 * 256 + 127.0)  # of two int8 parts

    @triton.jit
    def _norm_kernel(out, x, gain, K, width, eps, O: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
        """out (rows, width) = x (rows, K) or, with a gain, its RMSNorm; zeros past K. O: see above; 0: features stay in
        order."""
        slot = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        k = slot
        if O > 0:
            k = slot // (8 * O) * (8 * O) + slot // 2 % 4 * (2 * O) + slot // 8 % O * 2 + slot % 2
        gains = 1.0
        if gain is not None:
            gains = tl.load(gain + k, k < K, other=0.0).to(tl.float32)
        if PDL:  # in this order: the GEMM's programs must find multiprocessors free, or they crowd on a few
            tlx.gdc_wait()
            tlx.gdc_launch_dependents()
        x += tl.program_id(0).to(tl.int64) * K
        v = tl.load(x + k, k < K, other=0.0)
        if gain is not None:
            squares = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, K, BLOCK):
                at = start + tl.arange(0, BLOCK)
                part = tl.load(x + at, at < K, other=0.0).to(tl.float32)
                squares += part * part
            v = v.to(tl.float32) * tl.rsqrt(tl.sum(squares, 0) / K + eps) * gains
        tl.store(out + tl.program_id(0).to(tl.int64) * width + slot, v.to(out.dtype.element_ty), slot < width)

    @triton.jit
    def _magnitude(v):
        """|v| as an integer that compares alike, NaN being the largest."""
        return tl.abs(v).to(tl.int32, bitcast=True)

    @triton.jit
    def _fixed_point_kernel(
        out, scales, x, gain, K, width, eps, ALL: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
    ):  # fmt: skip
        """out int8 (rows, 2, width) and scales (rows,), of which 256 out[:, 0] + out[:, 1] times the scale are x
        (rows, K) or, with a gain, its RMSNorm; zeros past K. ALL: a block has all of a row."""
        row, k = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        gains = 1.0
        if gain is not None:
            gains = tl.load(gain + k, k < K, other=0.0).to(tl.float32)
        if PDL:  # see _norm_kernel
            tlx.gdc_wait()
            tlx.gdc_launch_dependents()
        x += row * K
        v = tl.load(x + k, k < K, other=0.0).to(tl.float32)
        squares = v * v
        v *= gains
        most = _magnitude(v)
        if not ALL:
            squares = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, K, BLOCK):
                at = start + tl.arange(0, BLOCK)
                other = tl.load(x + at, at < K, other=0.0).to(tl.float32)
                squares += other * other
                if gain is not None:
                    other *= tl.load(gain + at, at < K, other=0.0).to(tl.float32)
                most = tl.maximum(most, _magnitude(other))
        top = tl.max(most, 0).to(tl.float32, bitcast=True)
        finite = top - top  # zero, or else NaN, which no integer keeps
        factor = 1.0
        if gain is not None:
            factor = tl.rsqrt(tl.sum(squares, 0) / K + eps)
        q = v * tl.where(top > 0, LARGEST / top, 0.0)
        q = ((q + 12582912.0) - 12582912.0).to(tl.int32)  # to the nearest integer, ties to even
        high = (q + 128) >> 8
        out += row * 2 * width + k
        tl.store(out, high.to(tl.int8), k < width)
        tl.store(out + width, (q - high * 256).to(tl.int8), k < width)
        if tl.program_id(1) == 0:
            tl.store(scales + row, top * factor * (1.0 / LARGEST) + finite)

    @triton.jit
    def places(tile, N, K, KIND: tl.constexpr, GROUP: tl.constexpr, R: tl.constexpr, C: tl.constexpr, W: tl.constexpr):
        """Of a tile of 16 W R rows by C chunks: each lane's first word (F,), and of groups the first ones of its row
        (F,) or, of int4, of chunks (F / 4,).
        F is the axes (C R h W i j), for which Triton hands out lanes and warps from the last one on."""
        f = tl.arange(0, 64 * W * R * C)
        j, i, chunk = f % 4, f // 4 % 8, f // (64 * W * R)
        row = tile * (16 * W * R) + f // (64 * W) % R * (16 * W) + f // 32 % W * 16 + f // (32 * W) % 2 * 8 + i
        pairs = 0
        if KIND == "int4" or KIND == "mxfp4":
            blocks = tl.cdiv(K, 128) if GROUP < 256 else tl.cdiv(K, 256) * 2
            words = tl.minimum(row // 8, N // 8 - 1).to(tl.int64) * (blocks * 128) + (chunk * 128 + i * 16 + j * 4)
            g = tl.arange(0, 16 * W * R * C)  # without lanes j, which share pairs
            row8 = (tile * (16 * W * R) + g // (16 * W) % R * (16 * W) + g // 8 % W * 16 + g // (8 * W) % 2 * 8) // 8
            pairs = tl.minimum(row8, N // 8 - 1).to(tl.int64)
            if KIND == "int4":
                pairs = pairs * (tl.cdiv(K, 256) * (8 * 256 // GROUP)) + g % 8 * (256 // GROUP)
            else:
                pairs = pairs * (blocks * 32) + g % 8 * 4
        else:
            words = tl.minimum(row, N - 1).to(tl.int64) * (K // 4) + (chunk * 16 + j * 4)
            if GROUP > 0:
                pairs = tl.minimum(row, N - 1).to(tl.int64) * tl.cdiv(K, GROUP)
        return words, pairs

    @triton.jit
    def weights(
        w, s, words, pairs, step, K, KIND: tl.constexpr, GROUP: tl.constexpr, PAIRS: tl.constexpr, R: tl.constexpr,
        C: tl.constexpr, W: tl.constexpr, EVEN: tl.constexpr,
    ):  # fmt: skip
        """The words of a tile at step, and the pairs or scales of groups: of 4 bits one for each word, others (F,)."""
        FOUR: tl.constexpr = KIND == "int4" or KIND == "mxfp4"
        F: tl.constexpr = 64 * W * R * C
        f = tl.arange(0, F)
        blocks = tl.cdiv(K, 128) if GROUP < 256 else tl.cdiv(K, 256) * 2
        words = words[:, None] + tl.arange(0, 4)[None, :]
        at = w + tl.max_contiguous(tl.multiple_of(words, (1, 4)), (1, 4)) + step * (C * (128 if FOUR else 16))
        if EVEN:
            found = tl.load(at)
        elif FOUR:
            found = tl.load(at, (step * C + f // (64 * W * R) < blocks)[:, None], other=0)
        else:
            k = (step * C + f // (64 * W * R)) * 64 + f % 4 * 16
            found = tl.load(at, (k < K)[:, None], other=0)
        own = 0
        if PAIRS:
            s = s.to(tl.pointer_type(tl.int32))
        if not FOUR and GROUP > 0:
            k = (step * C + f // (64 * W * R)) * 64 + f % 4 * 16
            if EVEN:
                own = tl.load(s + pairs + k // GROUP)
            else:
                own = tl.load(s + pairs + k // GROUP, k < K, other=0)
        if FOUR:
            G: tl.constexpr = 128 // GROUP if GROUP < 128 else 1
            block = step * C + tl.arange(0, F // 4) // (16 * W * R)
            if KIND == "mxfp4":
                pairs += block * 32
            else:
                pairs += block // 2 * (8 * 256 // GROUP)
                if GROUP < 256:
                    pairs += block % 2 * (128 // GROUP)
            at = s + tl.max_contiguous(tl.multiple_of(pairs[:, None] + tl.arange(0, G)[None, :], (1, G)), (1, G))
            if EVEN:
                own = tl.load(at)
            else:
                own = tl.load(at, (block < blocks)[:, None], other=0)
            if KIND == "mxfp4":  # 2^(e - 121) twice, in bf16
                own = (own.to(tl.int32) + 6) * 0x00800080
            own = tl.broadcast_to(own[:, None, :, None], (F // 4, 4, G, 4 // G)).reshape(F, 4)
        return found, own

    @triton.jit
    def values(
        w, s, KIND: tl.constexpr, GROUP: tl.constexpr, PAIRS: tl.constexpr, S: tl.constexpr, DTYPE: tl.constexpr,
        ASM: tl.constexpr,
    ):  # fmt: skip
        """Words int32 (F, 4), and of groups their pairs in halves of S or their scales, as values (F, p, e) in DTYPE:
        what they stand for, or without groups int8 and fp8 without their scale; int8 with ASM divided by 64."""
        F: tl.constexpr = w.shape[0]
        FOUR: tl.constexpr = KIND == "int4" or KIND == "mxfp4"
        P: tl.constexpr = 16 if FOUR else 8
        if ASM is None:
            e = tl.arange(0, 2)[None, None, None, :]
            q = tl.arange(0, P // 4)[None, None, :, None]
            w = w[:, :, None, None]
            if KIND == "int4":
                scale, zero = unpacking.halves(s, S)
                out = ((w >> (4 * q + 16 * e) & 15) - 8).to(tl.float32) * scale[:, :, None, None]
                out = (out + zero[:, :, None, None]).to(DTYPE)
            elif KIND == "mxfp4":
                scale = ((s & 0xFFFF) << 16).to(tl.float32, bitcast=True) * 2.0**-6
                out = (unpacking.twice(w >> (4 * q + 16 * e) & 15) * (scale * 0.5)[:, :, None, None]).to(DTYPE)
            else:
                byte = (w >> (16 * q + 8 * e)).to(tl.int8)
                out = byte.to(DTYPE) if KIND == "int8" else byte.to(tl.float8e4nv, bitcast=True).to(DTYPE)
            out = out.reshape(F, P, 2)
        else:  # two neighbouring words at once: a register has two values of one of them; (F, uh e, ul, q) comes out
            if FOUR:
                a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
                    ASM, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r", [w, s], (tl.bfloat16,) * 8, is_pure=True, pack=2
                )
                out = tl.join(unpacking.join4(a, c, e, g), unpacking.join4(b, d, f, h))
            else:
                a, b, c, d = tl.inline_asm_elementwise(
                    ASM, "=&r,=&r,=&r,=&r,r,r", [w], (tl.bfloat16,) * 4, is_pure=True, pack=2
                )
                out = unpacking.join4(a, b, c, d)
            out = out.reshape(F, 2, 2, 2, P // 4).permute(0, 1, 3, 4, 2).reshape(F, P, 2)
        if not FOUR and GROUP > 0:
            out = unpacking.scaled(out, s[:, None, None], KIND, PAIRS, S, DTYPE, ASM)
        return out

    @triton.jit
    def settled(acc):
        """acc, once the tensor cores have made it. They read weights from registers, and Triton (3.6 and 3.7) lets them
        go on into the next step, where ptxas has given these registers to other values by then."""
        return tl.inline_asm_elementwise("// $0", "=f,0", [acc], tl.float32, is_pure=True, pack=1)

    @triton.jit(do_not_specialize=["M", "steps"])
    def _gemm_kernel(
        y, x, x_scales, w, s, bias, residual, partial, counts, M, N, K, steps,
        KIND: tl.constexpr, GROUP: tl.constexpr, PAIRS: tl.constexpr, SWIGLU: tl.constexpr, PADDED: tl.constexpr,
        BM: tl.constexpr, R: tl.constexpr, C: tl.constexpr, W: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr,
        ASM: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """y (M, N) = [residual +] W x [+ bias], or if SWIGLU `swiglu` of it (M, N / 2). x (M', K') is in the order of
        slots and, if PADDED, reaches to the end of its tiles; fp weights take it as it is, and int8 without groups as
        int8 (M', 2, K'), with scales. A program sums `steps` tiles along K; where SPLIT share a tile of y, the last one
        to come sums their parts, in the same order."""
        FIXED: tl.constexpr = x_scales is not None
        PLAIN: tl.constexpr = KIND == "fp" or FIXED  # tiles that tensor cores take from shared memory
        FOUR: tl.constexpr = KIND == "int4" or KIND == "mxfp4"
        P: tl.constexpr = 16 if FOUR else 8
        BN: tl.constexpr = 16 * W * R
        BK: tl.constexpr = C * 8 * P
        S: tl.constexpr = s.dtype.element_ty if GROUP > 0 else None
        tile_m, tile, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        k = tl.arange(0, BK)
        if PLAIN:
            row = tl.minimum(tile * BN + tl.arange(0, BN), N - 1).to(tl.int64) * K
            at_w = w + row[:, None] + k[None, :]
        else:
            words, pairs = places(tile, N, K, KIND, GROUP, R, C, W)
        first = part * steps
        last = tl.minimum(first + steps, tl.cdiv(K, BK))
        n = tile * BN + tl.arange(0, BN)
        if s is not None and GROUP == 0:
            scale = tl.load(s + n, n < N, other=0.0)
        if bias is not None:
            shift = tl.load(bias + n, n < N, other=0.0)
        if PDL:
            tlx.gdc_wait()
        m = tile_m * BM + tl.arange(0, BM)
        if FIXED:
            x_scale = tl.load(x_scales + m, m < M, other=0.0)
        of_x = m
        if FIXED:
            of_x = tile_m * (2 * BM) + tl.arange(0, 2 * BM)
        width = K
        if PADDED:
            width = tl.cdiv(K, BK) * BK
        at_x = x + of_x.to(tl.int64)[:, None] * width + k[None, :]
        acc = tl.zeros((BN, 2 * BM if FIXED else BM), tl.int32 if FIXED else tl.float32)
        for step in range(first, last):
            if not PLAIN:
                found, own = weights(w, s, words, pairs, step, K, KIND, GROUP, PAIRS, R, C, W, EVEN)
                a = values(found, own, KIND, GROUP, PAIRS, S, x.dtype.element_ty, ASM)
                a = a.reshape(C, R, 2, W, 8, 4, P, 2).permute(1, 3, 2, 4, 0, 6, 5, 7).reshape(BN, BK)
            elif EVEN:
                a = tl.load(at_w + step * BK)
            else:
                a = tl.load(at_w + step * BK, (step * BK + k < K)[None, :], other=0)
            if PADDED:
                rows = tl.load(at_x + step * BK)
            elif EVEN:
                rows = tl.load(at_x + step * BK, (m < M)[:, None], other=0.0)
            else:
                rows = tl.load(at_x + step * BK, (m < M)[:, None] & (step * BK + k < K)[None, :], other=0.0)
            acc = tl.dot(a, tl.trans(rows), acc, out_dtype=acc.dtype)
            if PDL and not PLAIN:
                acc = settled(acc)
        if FIXED:
            high, low = tl.split(acc.reshape(BN, BM, 2))
            acc = high.to(tl.float32) * 256.0 + low.to(tl.float32)
        outputs, of_y = N, n
        if SWIGLU:
            outputs, of_y = N // 2, tile * (BN // 2) + tl.arange(0, BN // 2)
        stored = (of_y < outputs)[:, None] & (m < M)[None, :]
        at = m[None, :].to(tl.int64) * outputs + of_y[:, None]
        if residual is not None:
            before = tl.load(residual + at, stored, other=0.0)
        if PDL:  # not before: what follows would take the places that become free first, all on a few multiprocessors
            tlx.gdc_launch_dependents()
        if SPLIT > 1:
            here = tile_m * tl.num_programs(1) + tile
            inner = tl.arange(0, BN)[:, None] + tl.arange(0, BM)[None, :] * BN
            inner += here.to(tl.int64) * (SPLIT * BN * BM)
            tl.store(partial + inner + part * (BN * BM), acc)
            tl.debug_barrier()
            if tl.atomic_add(counts + here, 1, sem="acq_rel") < SPLIT - 1:
                return
            tl.store(counts + here, 0)
            acc = tl.zeros((BN, BM), tl.float32)
            for part in tl.static_range(SPLIT):
                acc += tl.load(partial + inner + part * (BN * BM), cache_modifier=".cg")
        if KIND == "int8" and ASM is not None:
            acc *= 64.0
        if FIXED:
            acc *= x_scale[None, :]
        if s is not None and GROUP == 0:
            acc *= scale.to(tl.float32)[:, None]
        if bias is not None:
            acc += shift.to(tl.float32)[:, None]
        if SWIGLU:
            gate, up = tl.split(acc.reshape(BN // 16, 2, 8, BM).permute(0, 2, 3, 1))
            acc = (gate * up / (1 + tl.exp(-gate))).reshape(BN // 2, BM)
        if residual is not None:
            acc += before.to(tl.float32)
        tl.store(y + at, acc.to(y.dtype.element_ty), stored)


@functools.cache
def assembly(kind: str, scales: torch.dtype, dtype: torch.dtype, hopper: bool) -> str | None:
    """PTX that turns two int32 words, and of 4 bits their pairs or scales, into values as pairs of bf16, in order; None
    where the GPU or another dtype of values does not allow it. Of int4, nibbles a and a + 4 where they are, as the low
    bits of bf16, are so many times 2^-133; an FMA makes that exactly (q - 8) / 64, another one the value, rounded once.
    With scales in fp16 they are the low bits of 1024 + q or 1024 + 16 q, and what an FMA makes of them is rounded
    twice."""
    if not hopper or dtype != torch.bfloat16 or kind == "fp":
        return None
    if kind == "mxfp4":
        return _assembly_mxfp4()
    if kind != "int4":
        return unpacking.assembly(kind)
    if scales is torch.float16:
        return _assembly_fp16()
    lines = []
    for word in range(2):
        scale = f"prmt.b32 s, ${10 + word}, 0, 0x1010; mul.rn.bf16x2 s, s, d;"
        lines.append(f"{scale} prmt.b32 z, ${10 + word}, 0, 0x3232; mov.b32 t, ${8 + word};")
        for i in range(4):
            mask, factor = (("0x000f000f", "a"), ("0x00f000f0", "b"))[i % 2]
            o = f"${4 * word + i}"
            lines.append(f"{'shr.b32 t, t, 8;' if i == 2 else ''} and.b32 {o}, t, {mask};")
            lines.append(f"fma.rn.bf16x2 {o}, {o}, {factor}, c; fma.rn.bf16x2 {o}, {o}, s, z;")
    constants = {"a": "0x7f007f00", "b": "0x7d007d00", "c": "0xbe00be00", "d": "0x42804280"}  # 2^127, 2^123, -1/8, 64
    moves = [f"mov.b32 {name}, {value};" for name, value in constants.items()]
    return "{ .reg .b32 t, s, z, a, b, c, d; " + " ".join(moves + lines) + " }"


def _assembly_mxfp4() -> str:
    """As unpacking.assembly's, times 2^120 and then the scale, which are exact."""
    lines = []
    for word in range(2):
        for i, (sign, rest) in enumerate((("shl", "shl"), ("shl", "shl"), ("shl", "shr"), ("shl", "shr"))):
            o, w = f"${4 * word + i}", f"${8 + word}"
            lines.append(
                f"{sign}.b32 t, {w}, {12 - 4 * i}; and.b32 t, t, 0x80008000; {rest}.b32 s, {w}, {abs(6 - 4 * i)};"
            )
            lines.append(
                f"lop3.b32 t, t, s, 0x01c001c0, 0xf8; mul.rn.bf16x2 t, t, a; mul.rn.bf16x2 {o}, t, ${10 + word};"
            )
    return "{ .reg .b32 t, s, a; mov.b32 a, 0x7b807b80; " + " ".join(lines) + " }"


def _assembly_fp16() -> str:
    lines = []
    for word in range(2):
        lines.append(
            f"prmt.b32 s, ${10 + word}, 0, 0x1010; prmt.b32 z, ${10 + word}, 0, 0x3232; mov.b32 t, ${8 + word};"
        )
        for i in range(4):
            mask, factor, offset = (("0x000f000f", "a", "b"), ("0x00f000f0", "c", "d"))[i % 2]
            lines.append(f"{'shr.b32 t, t, 8;' if i == 2 else ''} and.b32 v, t, {mask}; or.b32 v, v, 0x64006400;")
            lines.append(f"fma.rn.f16x2 v, v, {factor}, {offset}; fma.rn.f16x2 v, v, s, z; mov.b32 {{l, h}}, v;")
            lines.append(f"cvt.f32.f16 fl, l; cvt.f32.f16 fh, h; cvt.rn.bf16x2.f32 ${4 * word + i}, fh, fl;")
    constants = {"a": "0x3c003c00", "b": "0xe408e408", "c": "0x2c002c00", "d": "0xd480d480"}  # 1, -1032, 1/16, -72
    moves = [f"mov.b32 {name}, {value};" for name, value in constants.items()]
    registers = ".reg .b32 t, s, z, v, a, b, c, d; .reg .b16 l, h; .reg .f32 fl, fh;"
    return f"{{ {registers} " + " ".join(moves + lines) + " }"


def rms_norm(x: Tensor, norm: Tensor | None, eps: float, kind: str = "", out: Tensor | None = None) -> Tensor:
    """RMSNorm (M, K) of x (M, K), or x itself without a gain `norm` (K,). With a kind of weight, in the order of slots
    that it wants, into the first rows of `out` (M', K'), which get zeros past K."""
    (M, K), out = x.shape, torch.empty_like(x) if out is None else out
    grid = (M, triton.cdiv(out.shape[1], FEATURES))
    order = ORDER.get(kind, 8)
    _norm_kernel[grid](out, x, norm, K, out.shape[1], eps, O=order, BLOCK=FEATURES, num_warps=8, **pdl(x.device))
    return out


def fixed_point(x: Tensor, norm: Tensor | None, eps: float, out: Tensor) -> Tensor:
    """x (M, K) or, with a gain `norm` (K,), its RMSNorm in the first rows of `out` (M', 2, K'), int8, as multiples of
    what is returned, fp32 (M,): 256 times the first row and the second."""
    (M, K), width = x.shape, out.shape[2]
    scales = torch.empty(M, dtype=torch.float32, device=x.device)
    block = min(WHOLE, triton.next_power_of_2(width))
    _fixed_point_kernel[(M, triton.cdiv(width, block))](
        out, scales, x, norm, K, width, eps, ALL=block >= K, BLOCK=block, num_warps=min(16, max(4, block // 512)),
        **pdl(x.device),
    )  # fmt: skip
    return scales


def gemm(
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
    """[residual +] W rms_norm(x) [+ bias]: x (M, K) -> (M, N) in `out_dtype`; with `swiglu`, SwiGLU of it (M, N / 2).
    See linear_triton.linear. CPU tensors are for Triton's interpreter."""
    (M, K), N, kind = x.shape, out_features(weight), kind_of(weight)
    group, pairs = group_of(K, kind, scales)
    fixed = kind == "int8" and not group
    how, launch = tuning.tile("fp8" if kind == "int8" and group else kind, N, K, M, x.device), pdl(x.device)
    BM, R, C, W = how.rows, how.row_repeat, how.k_repeat, how.num_warps
    BN, BK = 16 * W * R, C * max(64, tuning.CHUNK[kind])
    steps = triton.cdiv(triton.cdiv(K, BK), how.split)
    grid = (triton.cdiv(M, BM), triton.cdiv(N, BN), triton.cdiv(triton.cdiv(K, BK), steps))
    padded, x_scales = kind != "fp" or norm is not None, None
    if padded:
        width = triton.cdiv(K, BK) * BK
        shape, dtype = ((grid[0] * BM, 2, width), torch.int8) if fixed else ((grid[0] * BM, width), x.dtype)
        ordered = torch.empty(shape, dtype=dtype, device=x.device)
        if fixed:
            x_scales = fixed_point(x, norm, eps, ordered)
        else:
            rms_norm(x, norm, eps, kind, ordered)
    y = torch.empty(M, N // 2 if swiglu else N, dtype=out_dtype, device=x.device)
    partial = counts = None
    if grid[2] > 1:
        partial = torch.empty(grid[0] * grid[1] * grid[2] * BN * BM, dtype=torch.float32, device=x.device)
        counts = counters(x.device, TILES)
    _gemm_kernel[grid](
        y, ordered if padded else x, x_scales, weight if kind == "fp" or fixed else weight.view(torch.int32), scales,
        bias, residual, partial, counts, M, N, K, steps,
        KIND=kind, GROUP=group, PAIRS=pairs, SWIGLU=swiglu, PADDED=padded, BM=BM, R=R, C=C, W=W,
        SPLIT=grid[2], EVEN=K % BK == 0,
        ASM=None if fixed else assembly(kind, scales.dtype if scales is not None else None, x.dtype, launch["PDL"]),
        num_warps=W, num_stages=how.num_stages, **launch,
    )  # fmt: skip
    return y
