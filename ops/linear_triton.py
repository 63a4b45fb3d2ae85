"""The linear layers of a decode step (1 to 16 rows) on an NVIDIA GPU: one Triton kernel.

    run(layer, x, norm, residual)   the backend of linear.py
    linear(x, weight, ...)          [residual +] W rms_norm(x) [+ bias], or SwiGLU of it, over ranks or not, as an op
    pack(layer, dtype)              lay a weight out for it

Weights: (N, K) bf16 or fp16; (N, K) int8 or float8_e4m3fn with `scales` (N,), or in groups with what `pack_grouped`
makes of theirs; int32, what `pack_int4` makes of the portable int4 of disk, with its packed scales; and
float4_e2m1fn_x2, what `pack_mxfp4` makes of that of disk.

How the kernel works: at 1 to 16 rows it is a stream of weights, so everything serves keeping DRAM busy. A
program owns a few rows of W and all of K, split among its warps. Each lane loads 16 bytes of one row of W, and the K
axis of both operands is permuted (a sum does not care) so that these bytes already are a tensor-core fragment: no
shared memory, no shuffle between a load and its MMA. W is the 16-row operand and x the 8-column one, so that 8 rows
of x read no more weights than 1. One row alone spreads K over the 8 columns, for the fewest instructions, and meets
int8 and int4 weights in products of int8, fp8 in fp16: unpacked to bf16, as several rows have them, these would take
longer than they take to read.

Axes: M rows of x, N rows of W, K what is summed; of a tile j and i a warp's 4 x 8 lanes, W warps along K, R and C
repetitions along rows and K (tile_rows / 8 and k_repeat), u a lane's words; B blocks of 8 columns, X parts of x.
"""

import ctypes
import functools

import torch
from torch import Tensor, nn

from ops import linear_products as products
from ops import symmetric, tuning, unpacking, warps
from ops.common import MAX_ROWS, few_rows_on_triton, on_triton, op, pdl, tl, tlx, triton
from ops.packing import group_size, pack_4_bits, pack_grouped

# Kernels. ASM and PDL are off in the interpreter and on GPUs before Hopper, where plain Triton does the same.

if triton is not None:
    FEATURES = tl.constexpr(symmetric.MAX_FEATURES)
    SLOTS = tl.constexpr(symmetric.MAX_FEATURES * MAX_ROWS)

    @triton.jit
    def _weights(
        w, s, first, stop, k, N, K, KIND: tl.constexpr, GROUP: tl.constexpr, PAIRS: tl.constexpr, COLS: tl.constexpr,
        R: tl.constexpr, C: tl.constexpr, W: tl.constexpr, EVEN: tl.constexpr, PERSIST: tl.constexpr,
        SHARE: tl.constexpr, FULL: tl.constexpr,
    ):  # fmt: skip
        """The words of a tile of W, see `_rows_of`, at k and, of groups, int32 pairs of scale and zero or, without
        zeros, scales."""
        FOUR: tl.constexpr = KIND == "int4" or KIND == "mxfp4"
        PER_WORD: tl.constexpr = 2 if KIND == "fp" else 1 if FOUR else 4  # 4 bits' words lie 8 rows together
        j, i, warp, r, u = _axes(W, R)
        chunk = warp * C + tl.arange(0, C)[None, None, None, None, :, None]
        wanted = None
        if SHARE is not None:
            wanted = first + r < stop
            if not PERSIST:
                wanted = (r < SHARE) | wanted
        elif PERSIST:
            wanted = first * 8 < N
        pair = 0
        if FOUR:
            blocks = tl.cdiv(K, 128) if GROUP < 256 else tl.cdiv(K, 256) * 2
            # Where no row is beyond N, rows lie at constant distances, which are part of the loads' instructions: up to
            # 2.3 % of a step. (In 8 and 16 bits it loses 1 %.)
            begin = first.to(tl.int64)
            if not FULL:
                begin, r = 0, tl.minimum(first + r, N // 8 - 1).to(tl.int64)
            words = begin * (blocks * 128) + (r * (blocks * 128) + chunk * 128 + i * 16 + j * 4 + u)
            inside = chunk * 128 < K - k
        if KIND == "mxfp4":
            groups = begin * (blocks * 32) + (r * (blocks * 32) + bytes_of(chunk, i, j, W, C, COLS))
            pair = products.load(s, groups, k // 4, inside, EVEN, None, wanted)
        elif KIND == "int4":
            pairs = i * (256 // GROUP) + chunk // 2 * (8 * 256 // GROUP)
            if GROUP < 256:
                pairs += chunk % 2 * (128 // GROUP)
            if COLS == 1:  # lane j has a group of 32
                pairs = pairs + j // (GROUP // 32)
            else:
                GROUPS: tl.constexpr = 128 // GROUP if GROUP < 128 else 1
                pairs = tl.broadcast_to(pairs, (1, 8, W, 1, C, GROUPS))
                pairs += tl.arange(0, GROUPS)[None, None, None, None, None, :]
            row_pairs = tl.cdiv(K, 256) * (8 * 256 // GROUP)
            pairs = begin * row_pairs + (r * row_pairs + pairs)
            s = s.to(tl.pointer_type(tl.int32))
            pair = products.load(s, pairs, k // GROUP * 8, inside, EVEN, None, wanted)  # k is a multiple of 256
        else:
            row = tl.minimum((first + r) * 8 + i, N - 1)
            at = _place(chunk, j, KIND, C) * 4
            words = row.to(tl.int64) * (K // PER_WORD) + at + u
            inside = at * PER_WORD < K - k
            if GROUP > 0:  # lane j has 16 values in a row, all of one group
                group = row.to(tl.int64) * tl.cdiv(K, GROUP) + (k + at * 4) // GROUP
                if PAIRS:
                    s = s.to(tl.pointer_type(tl.int32))
                pair = products.load(s, group, 0, inside, EVEN, None, wanted)
        # In 8 bits leaving the caches first gains up to 10 %, in 4 bits, where a warp reads whole lines, passing L1 by
        # another 1 or 2 %; in 16 bits neither does.
        ONCE: tl.constexpr = ".cg" if FOUR else None if KIND == "fp" else "evict_first"
        return products.load(w, words, k // PER_WORD, inside, EVEN, ONCE, wanted), pair

    @triton.jit
    def _gain(gains, kx, k, K, EVEN: tl.constexpr):
        """A norm's gain, in words, at k; None without a norm."""
        gain = None
        if gains is not None:
            gain = products.load(gains, kx, k // 2, kx < (K - k) // 2, EVEN)
        return gain

    @triton.jit
    def _rows_of(tile, tiles, N, R: tl.constexpr, PART: tl.constexpr, SHARE: tl.constexpr):
        """A tile's first row of W and the one past its last, in eights. If tiles SHARE the rows, none has fewer, nor
        more than one eight, of gate and up two, above another. (A last tile may stop beyond N otherwise.)"""
        first, stop = tile * R, (tile + 1) * R
        if SHARE is not None:
            units = N // (8 * PART)
            first, stop = tile * units // tiles * PART, tl.minimum((tile + 1) * units // tiles, units) * PART
        return first, stop

    @triton.jit
    def _place(chunk, j, KIND: tl.constexpr, C: tl.constexpr):
        """Which 16 bytes of a row lane j has of a chunk. In 16 bits those of two chunks lie side by side, so that the
        first load asks for whole lines: 1.4 % of a step of 8 rows. (In 8 bits x would need moves for it.)"""
        if KIND == "fp" and C > 1:
            place = chunk // 2 * 8 + j * 2 + chunk % 2
        else:
            place = chunk * 4 + j
        return place

    @triton.jit
    def bytes_of(chunk, i, j, W: tl.constexpr, C: tl.constexpr, COLS: tl.constexpr):
        """Where `pack_mxfp4` has the scales of chunks in 8 rows: of lane j's group or, for several rows, of all 4."""
        at = chunk * 32 + i * 4
        if COLS == 1:
            at = at + j
        else:
            at = tl.broadcast_to(at, (1, 8, W, 1, C, 4)) + tl.arange(0, 4)[None, None, None, None, None, :]
        return at

    @triton.jit
    def _axes(W: tl.constexpr, R: tl.constexpr):
        j = tl.arange(0, 4)[:, None, None, None, None, None]
        i = tl.arange(0, 8)[None, :, None, None, None, None]
        warp = tl.arange(0, W)[None, None, :, None, None, None]
        r = tl.arange(0, R)[None, None, None, :, None, None]
        return j, i, warp, r, tl.arange(0, 4)[None, None, None, None, None, :]

    @triton.jit(do_not_specialize=["rank"])  # all ranks run the same code, and so sum in the same order
    def _linear_kernel(
        y, x, w, s, bias, norm, residual, buffers, counts, rank, M, N, tiles, end, eps, K: tl.constexpr,
        KIND: tl.constexpr, GROUP: tl.constexpr, PAIRS: tl.constexpr, SWIGLU: tl.constexpr, COLS: tl.constexpr,
        WORLD: tl.constexpr, GATHER: tl.constexpr, R: tl.constexpr, C: tl.constexpr, W: tl.constexpr,
        WHOLE: tl.constexpr, PERSIST: tl.constexpr, SHARE: tl.constexpr, FULL: tl.constexpr, EVEN: tl.constexpr,
        ASM: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """y (M, N) = [residual +] W n(x) [+ bias], or if SWIGLU `swiglu` of it (M, N / 2); M <= COLS rows of x.
        If WORLD is not 1, W n(x) [+ bias] is summed over so many ranks before that, each tile by itself (symmetric.py),
        or if GATHER the ranks' results, without a residual, are put side by side.

        A program has 8 R rows of W or, if it is to PERSIST, as many such tiles as it takes, in steps along K; if WHOLE,
        one step is all of K, and x is made ready once. If tiles SHARE the rows evenly, 8 R are the most that one has.
        Weights are asked for as soon as those before are used up, and the first ones before the wait for x.

        A compiler that knows K leaves out up to two fifths of the instructions. (That knows N, too, few more; but 1B's
        wqkv in int4 then takes 64 registers, two programs come up on one multiprocessor, and a step is 3 % slower.)
        `end` is where its whole steps end, which the compiler does not know: it would take the loop over them apart.

        Tiles have axes j (4 lanes along K), i (8 lanes along rows), W (warps along K), R and C (repetitions along rows
        and K), and last the lane's 16 bytes: with `flat`, Triton hands out lanes and warps to the axes in this order.

        COLS is 8 or 16, or 1: then the 8 columns of a fragment of x take parts of 32 values along K, each with zeros
        for the others, so that a lane loads x once and each part's products stay apart.
        """
        FOUR: tl.constexpr = KIND == "int4" or KIND == "mxfp4"
        P: tl.constexpr = 2 if KIND == "fp" else 8 if FOUR else 4  # values in a word
        CHUNK: tl.constexpr = 16 * P  # values along K that 4 lanes hold
        STEP: tl.constexpr = W * C * CHUNK
        X: tl.constexpr = C * CHUNK // 32  # parts of x in a warp's step, of which a lane holds 8 values each
        B: tl.constexpr = (COLS + 7) // 8
        DTYPE: tl.constexpr = x.dtype.element_ty
        SMALL: tl.constexpr = products.small(KIND, GROUP, COLS, ASM)
        IN_INT8: tl.constexpr = products.in_int8(KIND, GROUP, COLS)
        UNIT: tl.constexpr = products.unit(KIND, SMALL, IN_INT8, ASM)
        # The next tile's weights in 16 bits leave 16 warps no registers for sums in PTX.
        OWN: tl.constexpr = None if PERSIST and KIND == "fp" and W == 16 else ASM
        # Of groups, the dtype of a pair's halves, or of scales alone.
        S: tl.constexpr = s.dtype.element_ty if GROUP > 0 else None
        # Products that add up in the same registers wait for each other: 4 sums, where they are the longest.
        D: tl.constexpr = (C if C < 8 // R else 8 // R) if P == 4 and COLS == 8 else 1
        # A step's operand is made while its weights are on their way, but of 16 rows for weights to unpack when they
        # are there, its gain asked for right before: registers are too few to hold it until then.
        AHEAD: tl.constexpr = COLS < 16 or KIND == "fp"
        j, i, warp, _, u = _axes(W, R)
        if IN_INT8:  # other lanes have the same parts again
            PARTS: tl.constexpr = 4 if X > 4 else X
            part = tl.minimum(i // 2, PARTS - 1) + tl.arange(0, X // PARTS)[None, None, None, None, :, None] * PARTS
        elif COLS == 1:
            tl.static_assert(X <= 8, "a fragment has 8 columns for the parts of one row")
            part = tl.minimum(i, X - 1)
        else:
            part = tl.arange(0, X)[None, None, None, None, :, None]
        if P == 4:  # a lane's 16 values of 8 bits meet two loads of x, which is also read in words
            kx = warp * (C * CHUNK // 2) + (part // 2) * 32 + j * 8 + (part % 2) * 4 + u
        else:
            kx = warp * (C * CHUNK // 2) + _place(part, j, KIND, C) * 4 + u
        xs = x.to(tl.pointer_type(tl.int32))
        at_x = kx
        if COLS > 1:  # columns past M hold the last row again
            kx = tl.broadcast_to(kx, (4, 8, W, B, X, 4))
            row = tl.minimum(tl.arange(0, B)[None, None, None, :, None, None] * 8 + i, M - 1)
            at_x += row.to(tl.int64) * (K // 2)

        gains = norm
        if norm is not None:
            gains = norm.to(tl.pointer_type(tl.int32))

        if WORLD > 1:
            RANKS: tl.constexpr = triton.next_power_of_2(WORLD)
            source = tl.arange(0, RANKS)[:, None, None]
            theirs, mine = symmetric.addresses(buffers, source, rank, WORLD, SLOTS)
        tile = tl.program_id(0)
        if PDL:
            tlx.gdc_launch_dependents()
        # A gain comes before weights, which since the last step have driven it out of the L2 cache.
        gain = None
        if norm is not None and AHEAD:
            gain = _gain(gains, kx, 0, K, EVEN)
        PART: tl.constexpr = 2 if SWIGLU else 1
        first, stop = _rows_of(tile, tiles, N, R, PART, SHARE)
        w_now, s_now = _weights(
            w, s, first, stop, 0, N, K, KIND, GROUP, PAIRS, COLS, R, C, W, EVEN, PERSIST, SHARE, FULL
        )  # fmt: skip
        if PDL:
            tlx.gdc_wait()

        outputs = N // PART
        col = tl.arange(0, COLS)
        t = products.load(xs, at_x, 0, kx < K // 2, EVEN)
        SQUARES: tl.constexpr = (4, 8, W, 1) if COLS == 1 else (B * W, 16, 16)
        squares = tl.zeros(SQUARES, tl.float32)
        factor = tl.zeros((1, 1), tl.float32)
        if norm is not None and COLS == 1 and OWN is not None:  # one row's squares are left beside its first sums
            at_row = warps.place(W, 1, 1)
        if WHOLE:
            own = gain if AHEAD else _gain(gains, kx, 0, K, EVEN)
            b, x_scale, squares = products.operand(squares, t, own, KIND, GROUP, R, C, W, COLS, D, ASM, DTYPE)
        rounds = 1
        if PERSIST:
            rounds = tl.cdiv(tiles - tile, tl.num_programs(0))
        for turn in range(rounds):
            n = first * 8 + tl.arange(0, R * 8)
            of_y = first // PART * 8 + tl.arange(0, R * 8 // PART)
            past = N
            if SHARE is not None:
                past = stop * 8
            stored = (of_y < past // PART)[:, None] & (col < M)[None, :]
            at = col[None, :].to(tl.int64) * outputs + of_y[:, None]
            if P == 4 and GROUP == 0:
                scale = tl.load(s + n, mask=n < N, other=0.0)
            if bias is not None:
                shift = tl.load(bias + n, mask=n < N, other=0.0)
            if residual is not None:
                before = tl.load(residual + at, mask=stored, other=0.0)
            if WORLD > 1:
                count = tl.load(counts + n // 8, mask=n < past, other=0, cache_modifier=".cg") + 1
            acc = tl.zeros((D * W, R * 8, 4 if IN_INT8 else B * 8), tl.float32)
            if not WHOLE:
                squares = tl.zeros(SQUARES, tl.float32)
                if AHEAD:
                    b, x_scale, squares = products.operand(squares, t, gain, KIND, GROUP, R, C, W, COLS, D, ASM, DTYPE)
                # An uneven K's last step by itself: masks are up to a fourth of a step's instructions.
                for last in tl.static_range(1 if EVEN else 2):
                    for k in range(K // STEP * STEP if last else STEP, K if last else end, STEP):
                        # x is asked for before weights: loads come back in order, even from the L1 cache.
                        t_next = products.load(xs, at_x, k // 2, kx < (K - k) // 2, EVEN or not last)
                        if norm is not None and AHEAD:
                            gain = _gain(gains, kx, k, K, EVEN or not last)
                        if not AHEAD:
                            own = _gain(gains, kx, k - STEP, K, True)
                            b, x_scale, squares = products.operand(
                                squares, t, own, KIND, GROUP, R, C, W, COLS, D, ASM, DTYPE
                            )
                        acc = products.multiply(
                            acc, w_now, s_now, b, x_scale, KIND, GROUP, PAIRS, S, R, C, W, COLS, ASM, DTYPE
                        )
                        w_now, s_now = _weights(
                            w, s, first, stop, k, N, K, KIND, GROUP, PAIRS, COLS, R, C, W, EVEN or not last, PERSIST,
                            SHARE, FULL,
                        )  # fmt: skip
                        t = t_next
                        if AHEAD:
                            b, x_scale, squares = products.operand(
                                squares, t, gain, KIND, GROUP, R, C, W, COLS, D, ASM, DTYPE
                            )
                if not AHEAD:
                    own = _gain(gains, kx, (K - 1) // STEP * STEP, K, EVEN)
                    b, x_scale, squares = products.operand(squares, t, own, KIND, GROUP, R, C, W, COLS, D, ASM, DTYPE)
            if norm is not None and COLS == 1:
                of_row = products.squares_of_row(squares, KIND, GROUP, C)
            acc = products.multiply(acc, w_now, s_now, b, x_scale, KIND, GROUP, PAIRS, S, R, C, W, COLS, ASM, DTYPE)
            tile += tl.num_programs(0)
            if PERSIST:
                if not WHOLE:
                    t = products.load(xs, at_x, 0, kx < K // 2, EVEN)
                    if norm is not None and AHEAD:
                        gain = _gain(gains, kx, 0, K, EVEN)
                first, stop = _rows_of(tile, tiles, N, R, PART, SHARE)
                w_now, s_now = _weights(
                    w, s, first, stop, 0, N, K, KIND, GROUP, PAIRS, COLS, R, C, W, EVEN, PERSIST, SHARE, FULL
                )  # fmt: skip

            if D > 1:
                acc = tl.sum(acc.reshape(D, W, R * 8, B * 8), 0)
            if COLS == 1:
                acc = tl.sum(acc, 2, keep_dims=True)
            if norm is not None and COLS == 1 and OWN is not None and turn == 0:
                warps.leave_sums(at_row, of_row)
            out = warps.total(acc, PERSIST, OWN, turn if COLS == 1 else None)  # (rows of W, rows of x)
            out *= UNIT  # see unpacking.unpack
            if norm is not None:
                if COLS > 1:
                    half = tl.arange(0, 16)
                    total = tl.sum(tl.where(half[:, None] == half[None, :], squares, 0.0), 1)
                    if SMALL:  # see products.operand
                        total *= tl.where((half < 8) | (KIND != "int4"), 2.0**-64, 2.0**-60)[None, :]
                    total = tl.sum(total.reshape(B, W, 2, 8), 2).permute(1, 0, 2).reshape(W, COLS, 1)
                    total = warps.total(total, PERSIST, OWN).reshape(1, COLS)
                    out *= tl.rsqrt(total / K + eps)
                else:
                    if turn == 0:
                        total = tl.sum(of_row, 0) if OWN is None else warps.take_sums(at_row, W)
                        factor = tl.rsqrt(total / K + eps)
                    out *= factor
            if P == 4 and GROUP == 0:
                out *= scale.to(tl.float32)[:, None]
            if bias is not None:
                out += shift.to(tl.float32)[:, None]
            if SWIGLU:
                gate, up = tl.split(out.reshape(R // 2, 2, 8, COLS).permute(0, 2, 3, 1))
                out = (gate * up / (1 + tl.exp(-gate))).reshape(R * 4, COLS)
            if WORLD > 1:
                slot = (col[None, :] * FEATURES + n[:, None])[None, :, :]
                sent = stored[None, :, :] & (source < WORLD)
                out = out.to(tl.int32, bitcast=True)[None, :, :]
                out = symmetric.deliver(out, theirs, mine, slot, sent, count[None, :, None], WORLD, SLOTS)
                out = out.to(tl.float32, bitcast=True)
                if GATHER:
                    at = (col[None, :] * WORLD + source).to(tl.int64) * outputs + of_y[None, :, None]
                    stored = sent
                else:
                    out = tl.sum(out, 0)
            if residual is not None:
                out += before.to(tl.float32)
            tl.store(y + at, out.to(y.dtype.element_ty), mask=stored)
            if WORLD > 1:
                tl.debug_barrier()  # every thread has read the count
                tl.store(counts + n // 8, count, mask=n < past)


L2_FETCH_GRANULARITY = 5  # CU_LIMIT_MAX_L2_FETCH_GRANULARITY of CUDA's driver API
KINDS = {torch.int8: "int8", torch.float8_e4m3fn: "fp8", torch.int32: "int4", torch.float4_e2m1fn_x2: "mxfp4"}


def kind_of(weight: Tensor) -> str:
    """fp, int8, fp8, int4 or mxfp4, of a weight as the kernel reads it."""
    return KINDS.get(weight.dtype, "fp")


def group_of(K: int, kind: str, scales: Tensor | None) -> tuple[int, bool]:
    """A packed weight's group, 0 without any, and whether it has (scale, zero) pairs."""
    if kind == "int4":
        return 256 // scales.shape[3], True
    if kind == "mxfp4":
        return 32, False
    grouped = scales is not None and scales.ndim > 1
    return (group_size(K, scales.shape[1]), scales.ndim == 3) if grouped else (0, False)


def out_features(weight: Tensor) -> int:
    return weight.shape[0] * (8 if weight.ndim > 2 else 1)


def configuration(weight: Tensor, scales: Tensor | None, K: int, M: int) -> tuning.Configuration:
    """How to launch the kernel for a weight as it reads it, of K columns, and M rows of x."""
    kind = kind_of(weight)
    own = "fp8" if kind == "int8" and group_of(K, kind, scales)[0] else kind
    return tuning.configuration(own, out_features(weight), K, M, weight.device)


@op("linear")
def linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None = None,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    swiglu: bool = False,
    rank: int = 0,
    world: int = 1,
    gather: bool = False,
) -> Tensor:
    """[residual +] W rms_norm(x) [+ bias]: x (..., K) -> (..., N) in x's dtype or `out_dtype`, in one launch; with
    `swiglu`, SwiGLU of it (..., N / 2). CPU tensors are for Triton's interpreter.

    norm (K,) is RMSNorm's gain and `eps` its epsilon, without `norm` x is taken as it is; bias (N,); residual like the
    result. With several ranks in `world`, which have some columns each, W x [+ bias] is the sum of theirs; to gather,
    they have rows, and results without a residual lie side by side, (..., world N).
    """
    K, N, kind = x.shape[-1], out_features(weight), kind_of(weight)
    rows = x.reshape(-1, K).contiguous()
    M = len(rows)
    group, pairs = group_of(K, kind, scales)
    how = configuration(weight, scales, K, M)
    R, C, W = how.tile_rows // 8, how.k_repeat, how.num_warps
    launch, processors = pdl(x.device), tuning.processors(x.device)
    hopper = launch["PDL"]
    buffers = symmetric.symmetric_buffers(x.device) if world > 1 and N <= symmetric.MAX_FEATURES else None
    of_all = residual if world > 1 and buffers is None else None  # added with the others' parts
    residual = None if residual is None or of_all is not None else residual.contiguous()
    step = W * C * tuning.CHUNK[kind]
    tiles = triton.cdiv(N, how.tile_rows)
    programs = min(tiles, how.ctas_per_sm * processors or tiles)
    share = None
    if how.share and N % 16 == 0:
        programs = how.ctas_per_sm * processors
        tiles = triton.cdiv(tiles, programs) * programs
        # What every tile has; of several rows that is not made use of, which took a step 0.4 % longer.
        share = N // (16 if swiglu else 8) // tiles * (2 if swiglu else 1) if M == 1 else 0
    width = (N // 2 if swiglu else N) * (world if gather and buffers else 1)
    y = torch.empty(*x.shape[:-1], width, dtype=out_dtype or x.dtype, device=x.device)
    _linear_kernel[(programs,)](
        y, rows, weight.view(torch.int32), scales, bias, norm, residual,
        *(buffers[1] if buffers else (None, None)), rank, M, N, tiles, K // step * step, eps, K,
        KIND=kind, GROUP=group, PAIRS=pairs, SWIGLU=swiglu, COLS=tuning.columns(M),
        WORLD=world if buffers else 1, GATHER=gather and buffers is not None,
        R=R, C=C, W=W, WHOLE=step >= K, PERSIST=programs < tiles, SHARE=share,
        FULL=share is not None or N % how.tile_rows == 0, EVEN=K % step == 0,
        ASM=unpacking.assembly(kind, group == 0) if hopper and (x.dtype == torch.bfloat16 or kind == "fp") else None,
        num_warps=W, num_stages=1, **launch, **({"maxnreg": how.maxnreg} if hopper else {}),
    )  # fmt: skip
    return y if world == 1 or buffers else symmetric.all_reduce(y, gather, rank, world, of_all)


@torch.library.register_fake("gptfast::linear")
def _(
    x, weight, scales=None, bias=None, norm=None, eps=0.0, residual=None, out_dtype=None, swiglu=False, rank=0, world=1,
    gather=False,
):  # fmt: skip
    width = (out_features(weight) // 2 if swiglu else out_features(weight)) * (world if gather else 1)
    return x.new_empty((*x.shape[:-1], width), dtype=out_dtype or x.dtype)


@functools.cache
def fetch_lines(device: torch.device) -> None:
    """From now on, have a miss in a GPU's L2 cache bring 128 bytes, a line, instead of 64. Weights in 8 bits are read
    by 64 of a row at a time: 2 % of a step. (For the driver it is a hint.)"""
    if device.type == "cuda" and torch.version.cuda:
        with torch.cuda.device(device):
            torch.cuda.synchronize()  # which makes the device's context this thread's
            ctypes.CDLL("libcuda.so.1").cuCtxSetLimit(L2_FETCH_GRANULARITY, ctypes.c_size_t(128))


def pack(layer, dtype: torch.dtype) -> bool:
    """Lay a layer's weight out for the kernel and activations of `dtype`. Returns whether the kernel supports it. (In
    fp16, x times a norm's gain has to stay finite.)"""
    weight = layer.weight
    if not on_triton(weight) or dtype.itemsize != 2 or layer.in_features % 32:
        return False
    fetch_lines(weight.device)
    if weight.dtype is torch.uint8 and weight.shape[0] % 8 == 0:
        weight, scales = pack_4_bits(weight, layer.scales, layer.zeros)
        layer.weight, layer.scales = (nn.Parameter(t, requires_grad=False) for t in (weight, scales))
        layer.zeros = None
    if weight.dtype in (torch.int8, torch.float8_e4m3fn) and layer.scales.ndim == 2:  # of groups
        layer.scales = nn.Parameter(pack_grouped(layer.scales, layer.zeros), requires_grad=False)
        layer.zeros = None
    return weight.dtype in (dtype, *KINDS) and weight.is_contiguous()


def run(layer, x: Tensor, norm: nn.RMSNorm | None, residual: Tensor | None) -> Tensor | None:
    """The layer's result over all ranks, for a few rows of x."""
    gain, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    if not few_rows_on_triton(x) or (gain is not None and gain.dtype != x.dtype):
        return None
    dtype, ranks = torch.float32 if layer.fp32 else x.dtype, (layer.rank, layer.world if layer.reduce else 1)
    rest = (layer.bias, gain, eps, residual, dtype, layer.swiglu, *ranks, layer.reduce == "gather")
    return linear(x, layer.weight, layer.scales, *rest)
