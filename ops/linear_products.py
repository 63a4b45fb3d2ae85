"""What a step of the linear kernel (linear_triton.py) computes: a tile of weights of any kind times x, in Triton.

    operand(x, ...), multiply(acc, weights, operand, ...)
                        in int8 for one row of x and quantised weights, otherwise in 16 bits

Axes: j and i are a warp's 4 x 8 lanes, W warps along K, R and C repetitions along rows and K, u a lane's words; B
blocks of 8 columns of x, X parts of 32 values of it, D parts along K whose sums are apart; uh, ul, e the bits of a
value's place in a lane's 16 bytes. See linear_triton.py.
"""

from ops import unpacking
from ops.common import tl, triton
from ops.fragments import flat, unflat

if triton is not None:
    # prmt takes a byte of a table by each nibble's lower three bits or, where the highest one is set, its sign, here 0:
    # of two tables, for positive values and for negative ones, one gives 16 plus twice the value.
    E2M1_BYTES = tl.constexpr(
        "{ .reg .b32 p, n, t; mov.b32 t, $2; "
        "prmt.b32 p, 0x13121110, 0x1c181614, t; xor.b32 t, t, 0x88888888; "
        "prmt.b32 n, 0x0d0e0f10, 0x04080a0c, t; or.b32 $0, p, n; "
        "shr.b32 t, t, 16; prmt.b32 n, 0x0d0e0f10, 0x04080a0c, t; xor.b32 t, t, 0x8888; "
        "prmt.b32 p, 0x13121110, 0x1c181614, t; or.b32 $1, p, n; }"
    )

    # 0x6a: the first two and'ed, xor the third, which takes one instruction where the constants are in registers
    INT4_BYTES = tl.constexpr(
        "{ .reg .b32 m, s, t; mov.b32 m, 0xf0f0f0f0; mov.b32 s, 0x80808080; shl.b32 t, $2, 4; "
        "lop3.b32 $0, t, m, s, 0x6a; lop3.b32 $1, $2, m, s, 0x6a; }"
    )

    # Lane (j, i) gets what lanes (0, 2 j) and (0, 2 j + 1) have, whose parts of x are in its columns.
    OF_COLUMNS = tl.constexpr(
        "{ .reg .b32 l; mov.u32 l, %laneid; and.b32 l, l, 3; shl.b32 l, l, 3; shfl.sync.idx.b32 $0, $2, l, 31, -1; "
        "or.b32 l, l, 4; shfl.sync.idx.b32 $1, $2, l, 31, -1; }"
    )

    # Lane (j, i) gets what lane (0, 2 j) has, whose part of x is the j-th.
    OF_PART = tl.constexpr(
        "{ .reg .b32 l; mov.u32 l, %laneid; and.b32 l, l, 3; shl.b32 l, l, 3; shfl.sync.idx.b32 $0, $1, l, 31, -1; }"
    )

    @triton.constexpr_function
    def small(kind, group, cols, asm):
        """Whether weights are used so small that x is made larger for it: with assembly 4 bits and fp8 without groups,
        for several rows."""
        return asm is not None and cols > 1 and (kind in ("int4", "mxfp4") or (kind == "fp8" and group == 0))

    @triton.constexpr_function
    def in_int8(kind, group, cols):
        """Whether one row of x and its weights meet in int8: 4 bits, and int8 without groups."""
        return cols == 1 and (kind in ("int4", "mxfp4") or (kind == "int8" and group == 0))

    @triton.constexpr_function
    def in_half(kind, group, cols, asm):
        """Whether one row of bf16 and its weights meet in fp16: fp8 without groups, with assembly."""
        return kind == "fp8" and group == 0 and cols == 1 and asm is not None

    @triton.constexpr_function
    def unit(kind, small, in_int8, asm):
        """What products of a kind are to be multiplied with."""
        if kind == "fp8":
            return 2.0**56 if small else 1.0
        if kind == "mxfp4":
            return 2.0**62 if small else 0.5 if in_int8 else 1.0
        return 2.0**69 if small else 64.0 if kind == "int8" and not in_int8 and asm is not None else 1.0

    @triton.jit
    def _times(a, b, DTYPE: tl.constexpr, ASM: tl.constexpr):
        """The products, rounded, of the 16-bit values in words."""
        if ASM is not None:
            multiply: tl.constexpr = "mul.rn.bf16x2 $0, $1, $2;" if tl.bfloat16 == DTYPE else "mul.rn.f16x2 $0, $1, $2;"
            words = tl.inline_asm_elementwise(multiply, "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1)
        else:
            low_a, high_a = unpacking.halves(a, DTYPE)
            low_b, high_b = unpacking.halves(b, DTYPE)
            high = (high_a * high_b).to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) << 16
            words = high | (low_a * low_b).to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        return words

    @triton.jit
    def load(base, at, k, inside, EVEN: tl.constexpr, ONCE: tl.constexpr = None, wanted=None):
        """A tile (j i W R C u) from base + at + k, see `flat`; beyond an uneven K, zeros. Anything, if not wanted.

        ONCE: for what nothing reads again, how it goes through the caches, "evict_first" or, not through L1, ".cg"."""
        W: tl.constexpr = at.shape[2]
        R: tl.constexpr = at.shape[3]
        C: tl.constexpr = at.shape[4]
        mask = wanted
        if not EVEN:
            mask = inside if wanted is None else inside & wanted
        if mask is not None and mask.type.is_block():
            mask = flat(mask, W, R, C)
        tile = tl.load(  # k comes last: constant distances between offsets are then part of the instructions
            base + flat(at, W, R, C) + k,
            mask,
            other=None if EVEN else 0,
            eviction_policy="evict_first" if ONCE == "evict_first" else "",
            cache_modifier=".cg" if ONCE == ".cg" else "",
        )
        return unflat(tile, W, R, C)

    @triton.jit
    def _multiply(
        acc, w, s, b, sums, KIND: tl.constexpr, GROUP: tl.constexpr, PAIRS: tl.constexpr, S: tl.constexpr,
        R: tl.constexpr, C: tl.constexpr, W: tl.constexpr, COLS: tl.constexpr, ASM: tl.constexpr,
    ):  # fmt: skip
        """acc + a tile of weights, words (j i W R C u), times b. The K axis of both operands is permuted alike.

        int4: the sum of ((q - 8) scale + zero) x over a group is scale * (the sum of q x), where each group is a
        product of its own in the batch, plus (scale, zero) * (-8, 1) * (the sum of x), whose latter part is `_sums`.
        With ASM all of it is 2^-69 times as much. mxfp4 has scales alone, and with ASM is 2^-62 times as much. Other
        weights in groups become what they stand for, rounded once.
        """
        a = unpacking.unpack(w, KIND, b.dtype, ASM)
        FOUR: tl.constexpr = KIND == "int4" or KIND == "mxfp4"
        if not FOUR and GROUP > 0:
            a = unpacking.scaled(a.reshape(4, 8, W, R, C, 16), s, KIND, PAIRS, S, b.dtype, ASM)
        if FOUR:
            # (j i W R C, uh e ul ah al), word u being a group of 32 -> (j i W R C, uh ul ah al e)
            GROUPS: tl.constexpr = 128 // GROUP if GROUP < 128 else 1
            a = a.reshape(4, 8, W, R, C, 2, 2, 2, 2, 2).permute(0, 1, 2, 3, 4, 5, 7, 8, 9, 6)
            a = a.reshape(4, 8, W, R, C, GROUPS, 4 // GROUPS, 2, 2, 2).permute(4, 5, 2, 3, 1, 6, 8, 0, 7, 9)
            products = tl.dot(a.reshape(C * GROUPS * W, R * 8, 128 // GROUPS), b)
        if KIND == "mxfp4":
            acc = _add_products(acc, products, _per_row(unpacking.power(s), 4, R, C, W, COLS), C * 4)
        elif KIND == "int4":
            scale, _ = unpacking.halves(s, S)
            j = tl.arange(0, 4)[:, None, None, None, None]
            own = s  # of the groups, the one of lane j's part
            if GROUPS == 4:
                even, odd = tl.split(own.reshape(4, 8, W, R, C, 2, 2))
                own = tl.where(tl.expand_dims(j, 5) % 2 == 0, even, odd)
            if GROUPS > 1:
                first, second = tl.split(own)
                own = tl.where(j < 2, first, second)
            low, high = unpacking.halves(own, S)  # each meets both parts of `_sums`
            own = tl.join(tl.join(low, low), tl.join(high, high)).reshape(4, 8, W, R, C, 2, 2)
            acc = tl.dot(own.permute(2, 3, 1, 4, 6, 0, 5).reshape(W, R * 8, C * 16), sums, acc)
            acc = _add_products(acc, products, _per_row(scale, GROUPS, R, C, W, COLS), C * GROUPS)
        else:
            D: tl.constexpr = acc.shape[0] // W
            if KIND == "fp":  # (j i W R D C/D, uh e ul)
                a = a.reshape(4, 8, W, R, D, C // D, 2, 2, 2).permute(4, 2, 3, 1, 5, 8, 0, 6, 7)
            else:  # (j i W R D C/D, uh e ul p)
                a = a.reshape(4, 8, W, R, D, C // D, 2, 2, 2, 2).permute(4, 2, 3, 1, 5, 6, 9, 0, 8, 7)
            acc = tl.dot(a.reshape(D * W, R * 8, C // D * (32 if KIND == "fp" else 64)), b, acc)
        return acc

    @triton.jit
    def _add_products(acc, a, b, n: tl.constexpr):
        """acc + a * b summed over the first axis of (n, *acc's), one FMA each."""
        if n == 1:
            acc += a.reshape(acc.shape) * b.reshape(acc.shape)
        else:
            a0, a1 = tl.split(a.reshape(2, n // 2, acc.shape[0], acc.shape[1], acc.shape[2]).permute(1, 2, 3, 4, 0))
            b0, b1 = tl.split(b.reshape(2, n // 2, acc.shape[0], acc.shape[1], acc.shape[2]).permute(1, 2, 3, 4, 0))
            acc = _add_products(_add_products(acc, a0, b0, n // 2), a1, b1, n // 2)
        return acc

    @triton.jit
    def _per_row(s, GROUPS: tl.constexpr, R: tl.constexpr, C: tl.constexpr, W: tl.constexpr, COLS: tl.constexpr):
        """Spread a value per row and group, (j i W R C g) and the same for all j, over an accumulator's columns."""
        s = s.permute(4, 5, 2, 3, 1, 0).reshape(C * GROUPS * W, R * 8, 1, 4, 1)
        return tl.broadcast_to(s, (C * GROUPS * W, R * 8, COLS // 8, 4, 2)).reshape(C * GROUPS * W, R * 8, COLS)

    @triton.jit
    def operand(
        squares, t, gain, KIND: tl.constexpr, GROUP: tl.constexpr, R: tl.constexpr, C: tl.constexpr, W: tl.constexpr,
        COLS: tl.constexpr, D: tl.constexpr, ASM: tl.constexpr, DTYPE: tl.constexpr,
    ):  # fmt: skip
        """What a step multiplies weights with, from words t of x and, if there is a norm, those of its gain: the
        operand, in words, see `_fragment`; its scale where products are of int8 or `in_half`, or for several rows and
        int4 its `_sums`; and with a norm, sums of squares so far: of one row those of lanes, see `squares_of_row`, of
        several (B W, 16, 16), in other units where weights are `small`: of the 16 rows, 2^64 and, of int4, 2^60."""
        FOUR: tl.constexpr = KIND == "int4" or KIND == "mxfp4"
        scale = 0.0
        if COLS == 1:
            if gain is not None:
                low, high = unpacking.halves(t, DTYPE)
                squares += tl.sum(tl.sum(low * low + high * high, 5), 4)
                t = _times(t, gain, DTYPE, ASM)
            if in_int8(KIND, GROUP, COLS):
                t, scale = _in_int8(t, KIND, R, C, W, ASM, DTYPE)
            elif in_half(KIND, GROUP, COLS, ASM):
                t, scale = _in_half(t, R, W, DTYPE)
        else:
            X: tl.constexpr = C * (1 if KIND == "fp" else 4 if FOUR else 2)
            B: tl.constexpr = (COLS + 7) // 8
            plain = t
            if small(KIND, GROUP, COLS, ASM):
                # 2^64 times as much, which keeps products away from 0, and of int4 as unpacked weights are
                lift = tl.full((1, 1, 1, 1, 1, 4), 0x5F805F80, tl.int32)
                if KIND == "int4":
                    u = tl.arange(0, 4)[None, None, None, None, None, :]
                    lift = tl.where(u % 2 == 0, 0x5F805F80, 0x5D805D80)
                t = _times(t, lift, DTYPE, ASM)
            if gain is not None:
                # The sum of squares is the diagonal of x x^T, which costs the tensor cores next to nothing; here of two
                # halves of each row, which as the 16 rows of a fragment need the fewest moves.
                L: tl.constexpr = 2 if X > 1 else 1
                rows = unpacking.unpack(plain, "fp", DTYPE, ASM).reshape(4, 8, W, B, X // L, L, 2, 2, 2)
                cols = unpacking.unpack(t, "fp", DTYPE, ASM).reshape(4, 8, W, B, X // L, L, 2, 2, 2)
                rows = rows.permute(3, 2, 8, 1, 4, 6, 0, 5, 7).reshape(B * W, 16, X * 16)
                cols = cols.permute(3, 2, 4, 6, 0, 5, 7, 8, 1).reshape(B * W, X * 16, 16)
                squares = tl.dot(rows, cols, squares)
                t = _times(t, gain, DTYPE, ASM)
            if KIND == "int4":
                scale = _sums(unpacking.unpack(t, "fp", DTYPE, ASM).reshape(4, 8, W, B, C, 4, 2, 2, 2), ASM)
        return t, scale, squares

    @triton.jit
    def _fragment(
        t, KIND: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, W: tl.constexpr, COLS: tl.constexpr,
        D: tl.constexpr, ASM: tl.constexpr, DTYPE: tl.constexpr,
    ):  # fmt: skip
        """An `operand` as the tensor cores take it, of 16 bits in D parts along K. It travels in words, as those that
        its weights meet one step later stay in registers so."""
        FOUR: tl.constexpr = KIND == "int4" or KIND == "mxfp4"
        i = tl.arange(0, 8)[None, :, None, None, None, None]
        if in_int8(KIND, GROUP, COLS):
            X: tl.constexpr = C * (2 if KIND == "int8" else 4)
            PARTS: tl.constexpr = 4 if X > 4 else X
            own = tl.expand_dims(i // 2, 6) == tl.arange(0, PARTS)[None, None, None, None, None, :, None]
            t = tl.where(own, tl.expand_dims(t, 5), 0)  # (j i W 1 D, parts, halves)
            b = _bytes(t.reshape(4, 8, W, 1, X // 2, 4), ASM).reshape(4, 8, W, X // PARTS, PARTS // 2, 2, 2, 4)
            b = b.permute(3, 2, 4, 5, 0, 6, 7, 1).reshape(X // PARTS * W, PARTS * 32, 8)
        else:
            X: tl.constexpr = C * (1 if KIND == "fp" else 4 if FOUR else 2)
            B: tl.constexpr = (COLS + 7) // 8
            if COLS == 1:
                t = tl.where(i == tl.arange(0, X)[None, None, None, None, :, None], t, 0)
            # (j i W B X, uh e ul), words of x being u = 2 uh + ul
            t = unpacking.unpack(t, "fp", tl.float16 if in_half(KIND, GROUP, COLS, ASM) else DTYPE, ASM)
            # The two halves of a fragment's K are a word's neighbours, which a load of 16 bytes leaves side by side.
            if FOUR:  # (j i W B, C g c, uh e ul) -> (C g W, c ul j uh e, B i)
                GROUPS: tl.constexpr = 128 // GROUP if GROUP < 128 else 1
                b = t.reshape(4, 8, W, B, C, GROUPS, 4 // GROUPS, 2, 2, 2).permute(4, 5, 2, 6, 9, 0, 7, 8, 3, 1)
                b = b.reshape(C * GROUPS * W, 128 // GROUPS, B * 8)
            else:
                b = t.reshape(4, 8, W, B, D, X // D, 2, 2, 2).permute(4, 2, 5, 8, 0, 6, 7, 3, 1)
                b = b.reshape(D * W, X // D * 32, B * 8)
        return b

    @triton.jit
    def _in_half(t, R: tl.constexpr, W: tl.constexpr, DTYPE: tl.constexpr):
        """One row of x, words of bf16 of which lane i has part i, in fp16, and the power of two that each part is to be
        multiplied with, (W, rows, columns). (x keeps all its bits to 2^-22 of a part's largest magnitude.)"""
        low, high = unpacking.halves(t, DTYPE)
        exponent, inverse = _power_of(low, high)
        inverse *= 256.0
        words = tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low * inverse, high * inverse], tl.int32, is_pure=True, pack=1
        )
        scale = tl.broadcast_to(exponent.to(tl.float32, bitcast=True) * (1 / 256), (4, 8, W, 1, 1, 1))
        even, odd = tl.inline_asm_elementwise(
            OF_COLUMNS, "=&r,=r,r", [scale], (tl.float32, tl.float32), is_pure=False, pack=1
        )
        scale = tl.broadcast_to(tl.join(even, odd).reshape(4, 8, W, 1, 2), (4, 8, W, R, 2))
        return words, scale.permute(2, 3, 1, 0, 4).reshape(W, R * 8, 8)

    @triton.jit
    def _power_of(low, high):
        """The power of two of each part's largest magnitude, as fp32's bits, and its inverse."""
        top = tl.max(tl.max(tl.maximum(tl.abs(low), tl.abs(high)), 5, keep_dims=True), 0, keep_dims=True)
        exponent = tl.maximum(top, 1e-30).to(tl.int32, bitcast=True) & 0x7F800000
        return exponent, ((254 << 23) - exponent).to(tl.float32, bitcast=True)

    @triton.jit
    def _sums(t, ASM: tl.constexpr):
        """For `_multiply`, -8 and 1 times the sum of each 32 values of x (j i W B C part, uh e ul), in the two parts of
        11 bits that it takes to be exact: (W, C f j h, B i), f being the factor and h the part."""
        W: tl.constexpr = t.shape[2]
        B: tl.constexpr = t.shape[3]
        C: tl.constexpr = t.shape[4]
        t = t.reshape(4, 8, W, B, C, 2, 2, 2, 2, 2)  # parts are 2 p + q: j i W B C p q, uh e ul
        # rows are halves of x's, as in sums of squares; columns 2 part + f, so that lane j gets the sums of part j
        rows = t.permute(4, 3, 2, 9, 1, 5, 7, 0, 6, 8).reshape(C * B * W, 16, 64)
        i = tl.arange(0, 8)[None, :, None, None, None, None, None, None, None]
        p = tl.arange(0, 2)[None, None, None, None, None, :, None, None, None]
        q = tl.arange(0, 2)[None, None, None, None, None, None, :, None, None]
        if ASM is None:
            factor = tl.where(i % 2 == 0, -8.0, 1.0).to(t.dtype)
        else:  # as `unpacking.unpack` has weights
            factor = tl.where(i % 2 == 0, -0x7FF8, 1).to(tl.int16).to(t.dtype, bitcast=True)
        factor = tl.where(i // 2 == 2 * p + q, factor, 0.0)
        factor = tl.broadcast_to(factor, (4, 8, W, B, C, 2, 2, 2, 2))
        if ASM is not None:  # which gives it the layout of t, and so no detour through shared memory
            even, _ = tl.split(t)
            factor = tl.inline_asm_elementwise("mov.b32 $0, $2;", "=r,r,r", [even, factor], t.dtype, True, 2)
        factor = factor.permute(4, 3, 2, 5, 7, 0, 6, 8, 1).reshape(C * B * W, 64, 8)
        sums = tl.dot(rows, factor)
        even, odd = tl.split(sums.reshape(C * B * W, 2, 8, 8).permute(0, 2, 3, 1))
        sums = even + odd * (1 if ASM is None else 16)
        high = (sums.to(tl.int32, bitcast=True) + 4096 & -8192).to(tl.float32, bitcast=True)
        low = ((sums - high).to(tl.int32, bitcast=True) + 4096).to(tl.float32, bitcast=True)
        sums = tl.join(high, low).reshape(C, B, W, 8, 4, 2, 2)  # C B W i j f h -> W C f j h B i
        return sums.permute(2, 0, 5, 4, 6, 1, 3).reshape(W, C * 16, B * 8)

    @triton.jit
    def multiply(
        acc, w, s, t, scale, KIND: tl.constexpr, GROUP: tl.constexpr, PAIRS: tl.constexpr, S: tl.constexpr,
        R: tl.constexpr, C: tl.constexpr, W: tl.constexpr, COLS: tl.constexpr, ASM: tl.constexpr, DTYPE: tl.constexpr,
    ):  # fmt: skip
        """acc and a tile of weights, words w and their groups' scales s, times an `operand`."""
        b = _fragment(t, KIND, GROUP, C, W, COLS, acc.shape[0] // W, ASM, DTYPE)
        if in_int8(KIND, GROUP, COLS):
            acc = _multiply_in_int8(acc, w, s, b, scale, KIND, S, R, C, W, ASM)
        elif in_half(KIND, GROUP, COLS, ASM):
            none = tl.zeros(acc.shape, tl.float32)
            acc += _multiply(none, w, s, b, 0.0, KIND, GROUP, PAIRS, S, R, C, W, COLS, ASM) * scale
        else:
            acc = _multiply(acc, w, s, b, scale, KIND, GROUP, PAIRS, S, R, C, W, COLS, ASM)
        return acc

    @triton.jit
    def squares_of_row(squares, KIND: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr):
        """An `operand`'s sums of squares of one row, (j i W 1), as those of each warp, (W, 1, 1)."""
        FOUR: tl.constexpr = KIND == "int4" or KIND == "mxfp4"
        X: tl.constexpr = C * (1 if KIND == "fp" else 4 if FOUR else 2)
        i = tl.arange(0, 8)[None, :, None, None]
        if in_int8(KIND, GROUP, 1):  # lanes 2 p and 2 p + 1 have part p, of at most 4
            first = (i % 2 == 0) & (i // 2 < X)
        else:
            first = i < X
        return tl.sum(tl.sum(tl.where(first, squares, 0.0), 1), 0).reshape(squares.shape[2], 1, 1)

    @triton.jit
    def _bytes(w, ASM: tl.constexpr):
        """The bytes of words int32 (4, 8, W, R, C, 4): int8 (4, 8, W, R, C, 4, 4)."""
        if ASM is None:
            shift = 8 * tl.arange(0, 4)[None, None, None, None, None, None, :]
            out = (tl.expand_dims(w, 6) >> shift).to(tl.int8)
        else:  # four words go in, and four registers of four results come out, as in unpacking.unpack
            move: tl.constexpr = "mov.b32 $0, $4; mov.b32 $1, $5; mov.b32 $2, $6; mov.b32 $3, $7;"
            a, b, c, d = tl.inline_asm_elementwise(
                move, "=&r,=&r,=&r,=&r,r,r,r,r", [w], (tl.int8,) * 4, is_pure=True, pack=4
            )
            out = unpacking.join4(a, b, c, d).reshape(w.shape[0], w.shape[1], w.shape[2], w.shape[3], w.shape[4], 4, 4)
            out = out.permute(0, 1, 2, 3, 4, 6, 5)
        return out

    @triton.jit
    def _pick(a, b, c, d, odd, ASM: tl.constexpr):
        """A word of the second bytes of a, b, c, d or, where odd, of the first ones with the highest bit turned."""
        if ASM is None:
            shift = tl.where(odd, 0, 8)
            word = (a >> shift & 255) | (b >> shift & 255) << 8 | (c >> shift & 255) << 16 | (d >> shift & 255) << 24
        else:
            permute: tl.constexpr = (
                "{ .reg .b32 t, u; prmt.b32 t, $1, $2, $5; prmt.b32 u, $3, $4, $5; prmt.b32 $0, t, u, 0x5410; }"
            )
            select = tl.where(odd, 0x40, 0x51)
            word = tl.inline_asm_elementwise(
                permute, "=r,r,r,r,r,r", [a, b, c, d, select], tl.int32, is_pure=True, pack=1
            )
        return word ^ tl.where(odd, -0x7F7F7F80, 0)

    @triton.jit
    def _in_int8(
        t, KIND: tl.constexpr, R: tl.constexpr, C: tl.constexpr, W: tl.constexpr, ASM: tl.constexpr, DTYPE: tl.constexpr
    ):
        """`operand` for one row of x and quantised weights, in products of int8.

        x becomes 16-bit integers, with a power of two for each group of 32 values, and these a high and a low byte:
        x = scale (256 high + low), to 2^-14 of the group's largest magnitude, so that what a bf16 product would see is
        exact unless it is 2^6 times smaller. Of the 8 columns of a fragment of x, columns 2 p and 2 p + 1 are the high
        and the low bytes of group p, with zeros for the others' K, and the products of 4 groups stay apart.
        """
        X: tl.constexpr = C * (2 if KIND == "int8" else 4)  # groups in a warp's step
        PARTS: tl.constexpr = 4 if X > 4 else X  # in a fragment
        D: tl.constexpr = X // PARTS
        i = tl.arange(0, 8)[None, :, None, None, None, None]
        low, high = unpacking.halves(t, DTYPE)
        exponent, inverse = _power_of(low, high)
        inverse *= 8192.0  # 2^13 / 2^exponent
        # fp32 that holds integers: 1.5 * 2^23, and 128 so that the second byte is the high one of signed low ones
        low = (low * inverse + 12583040.0).to(tl.int32, bitcast=True).reshape(4, 8, W, 1, D, 2, 2)
        high = (high * inverse + 12583040.0).to(tl.int32, bitcast=True).reshape(4, 8, W, 1, D, 2, 2)
        odd = i % 2 == 1
        if KIND == "int4":  # values in the order of a word's low, then high nibbles
            low0, low1 = tl.split(low.permute(0, 1, 2, 3, 4, 6, 5))
            high0, high1 = tl.split(high.permute(0, 1, 2, 3, 4, 6, 5))
            word = _pick(low0, low1, high0, high1, odd, ASM)
        elif KIND == "mxfp4":  # in the order of a word's nibbles
            low0, low2, low1, low3 = _four(low)
            high0, high2, high1, high3 = _four(high)
            odd = i.reshape(1, 8, 1, 1, 1) % 2 == 1
            word = tl.join(_pick(low0, low1, low2, low3, odd, ASM), _pick(high0, high1, high2, high3, odd, ASM))
        else:
            low0, low1 = tl.split(low)
            high0, high1 = tl.split(high)
            word = _pick(low0, high0, low1, high1, odd, ASM)
        scale = exponent.to(tl.float32, bitcast=True) * (1 / 8192 / 16 if KIND == "int4" else 1 / 8192)
        if ASM is None:
            scale = tl.max(scale.reshape(4, 2, W, D), 1).permute(2, 1, 0).reshape(D * W, 1, 4)
            scale = tl.broadcast_to(scale, (D * W, R * 8, 4))
        else:  # as sums have it, so that no warp waits for others where Triton would go through shared memory
            scale = tl.broadcast_to(scale, (4, 8, W, 1, D, 1))
            scale = tl.inline_asm_elementwise(OF_PART, "=r,r", [scale], tl.float32, is_pure=False, pack=1)
            scale = tl.broadcast_to(scale.reshape(4, 8, W, D, 1), (4, 8, W, D, R))
            scale = scale.permute(3, 2, 4, 1, 0).reshape(D * W, R * 8, 4)
        return word, scale

    @triton.jit
    def _four(t):
        """The parts of t (..., 2, 2), of which the last axis comes first."""
        even, odd = tl.split(t)
        a, b = tl.split(even)
        c, d = tl.split(odd)
        return a, b, c, d

    @triton.jit
    def _e2m1(w, ASM: tl.constexpr):
        """16 plus twice the values of words of e2m1, in bytes: those of the lowest four nibbles, and of the others."""
        if ASM is None:
            low, high = w * 0, w * 0
            for i in tl.static_range(4):
                low |= unpacking.twice(w >> (4 * i) & 15) + 16 << (8 * i)
                high |= unpacking.twice(w >> (4 * i + 16) & 15) + 16 << (8 * i)
        else:
            low, high = tl.inline_asm_elementwise(
                E2M1_BYTES, "=&r,=&r,r", [w], (tl.int32, tl.int32), is_pure=True, pack=1
            )
        return low, high

    @triton.jit
    def _int4(w, ASM: tl.constexpr):
        """16 times q - 8 of words of q, in bytes: those of the low nibbles, and of the high ones."""
        if ASM is None:
            low, high = w << 4 & -0x0F0F0F10 ^ -0x7F7F7F80, w & -0x0F0F0F10 ^ -0x7F7F7F80
        else:
            low, high = tl.inline_asm_elementwise(
                INT4_BYTES, "=&r,=r,r", [w], (tl.int32, tl.int32), is_pure=True, pack=1
            )
        return low, high

    @triton.jit
    def _multiply_in_int8(
        acc, w, s, b, scale, KIND: tl.constexpr, S: tl.constexpr, R: tl.constexpr, C: tl.constexpr, W: tl.constexpr,
        ASM: tl.constexpr,
    ):  # fmt: skip
        X: tl.constexpr = C * (2 if KIND == "int8" else 4)
        PARTS: tl.constexpr = 4 if X > 4 else X
        D: tl.constexpr = X // PARTS
        if KIND != "int8":  # (j i W R C, 4 groups, bytes) twice -> (C W, R i, group j half byte)
            if KIND == "int4":
                low, high = _int4(w, ASM)
            else:
                low, high = _e2m1(w, ASM)
            a = tl.join(_bytes(low, ASM), _bytes(high, ASM))
            a = a.permute(4, 2, 3, 1, 5, 0, 7, 6).reshape(D * W, R * 8, 128)
            OFFSET: tl.constexpr = 16 if KIND == "int4" else -16
            sums = tl.dot(tl.full((D * W, R * 8, 128), OFFSET, tl.int8), b, out_dtype=tl.int32)
            if KIND == "int4":  # products that do not wait for those sums
                gain, zero = unpacking.halves(s, S)
                zero = zero.permute(4, 2, 3, 1, 0, 5).reshape(D * W, R * 8, 4)
                gain = gain.permute(4, 2, 3, 1, 0, 5).reshape(D * W, R * 8, 4)
                y = gain * _whole(tl.dot(a, b, out_dtype=tl.int32)) + zero * _whole(sums)
            else:
                y = _whole(tl.dot(a, b, sums, out_dtype=tl.int32))  # of twice the values
                y *= unpacking.power(s).permute(4, 2, 3, 1, 0, 5).reshape(D * W, R * 8, 4)
        else:  # (j i W R D c, 2 groups, halves, bytes)
            a = _bytes(w, ASM).reshape(4, 8, W, R, D, C // D, 2, 2, 4)
            a = a.permute(4, 2, 3, 1, 5, 6, 0, 7, 8).reshape(D * W, R * 8, PARTS * 32)
            y = _whole(tl.dot(a, b, out_dtype=tl.int32))
        return _add_products(acc, y, scale, D)

    @triton.jit
    def _whole(y):
        """Products with high and low bytes int32 (n, rows, 8) -> with what they are of, fp32 (n, rows, 4)."""
        high, low = tl.split(y.reshape(y.shape[0], y.shape[1], 4, 2))
        return (high * 256 + low).to(tl.float32)
