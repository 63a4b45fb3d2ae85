"""What words of weights and activations hold: their values, in Triton and, on Hopper, in PTX.

    unpack(w, kind, ...)    int32 words -> their values
    assembly(kind, ...)     PTX that does it, for Hopper; without it plain Triton does the same
    halves(w, dtype)        words of two 16-bit values -> both, fp32
    scaled(a, s, ...)       weights in groups as what they stand for
    join4(a, b, c, d)       (...,) x 4 -> (..., 2, 2)

Axes: j and i are a warp's 4 x 8 lanes, W warps, R and C repetitions along rows and K, u a lane's words; uh, ul, e the
bits of a value's place in a lane's 16 bytes. See packing.py for what is packed how, and linear_triton.py.
"""

from ops.common import tl, triton

if triton is not None:
    # Four values of e4m3 of each of two words, as pairs of fp16, which takes one instruction: Hopper has none for bf16.
    FP8_HALVES = tl.constexpr(
        "{ .reg .b16 l, h; mov.b32 {l, h}, $4; cvt.rn.f16x2.e4m3x2 $0, l; cvt.rn.f16x2.e4m3x2 $1, h; "
        "mov.b32 {l, h}, $5; cvt.rn.f16x2.e4m3x2 $2, l; cvt.rn.f16x2.e4m3x2 $3, h; }"
    )

    @triton.jit
    def join4(a, b, c, d):  # (...,) x 4 -> (..., 2, 2), in order
        return tl.join(tl.join(a, c), tl.join(b, d))

    def assembly(kind: str, small: bool = False) -> str:
        """PTX that turns two int32 words into their values as pairs of bf16, in order; fp8 may be left `small`."""
        bodies = {
            # q + 128 as the low bits of a bf16 is so many times 2^-133, subnormal or not; an FMA makes that q / 64
            "int8": [
                f"{flip} prmt.b32 {{o}}, t, 0, {pick}; fma.rn.bf16x2 {{o}}, {{o}}, a, b;"
                for flip, pick in (("xor.b32 t, {w}, 0x80808080;", "0x4140"), ("", "0x4342"))
            ],
            # e4m3's bits, moved into bf16's exponent and mantissa, behind a byte of signs, are the value times 2^-120
            "fp8": [
                f"prmt.b32 t, {{w}}, 0, {pick}; shl.b32 t, t, 4; and.b32 {{o}}, t, 0x87f087f0;"
                + ("" if small else "mul.rn.bf16x2 {o}, {o}, c;")
                for pick in ("0x9180", "0xb3a2")
            ],
            # nibbles a and a + 4 where they are, in the low 8 bits of bf16, which alone are so many times 2^-133
            "int4": [
                f"{shift} and.b32 {{o}}, {word}, {mask};"
                for shift, word in (("", "{w}"), ("shr.b32 t, {w}, 8;", "t"))
                for mask in ("0x000f000f", "0x00f000f0")
            ],
            # e2m1's bits, moved into bf16's, are the value times 2^-126, subnormal or not
            "mxfp4": [
                f"{sign} t, {{w}}, {abs(12 - a)}; and.b32 t, t, 0x80008000; {rest} s, {{w}}, {abs(6 - a)};"
                "lop3.b32 {o}, t, s, 0x01c001c0, 0xf8;"
                for a, sign, rest in ((0, "shl.b32", "shl.b32"), (4, "shl.b32", "shl.b32"), (8, "shl.b32", "shr.b32"))
            ]
            + ["and.b32 t, {w}, 0x80008000; shr.b32 s, {w}, 6; lop3.b32 {o}, t, s, 0x01c001c0, 0xf8;"],
        }
        body = bodies.get(kind, [])
        n = 2 * len(body)
        lines = [body[i % len(body)].format(o=f"${i}", w=f"${n + i // len(body)}") for i in range(n)]
        constants = {"a": "0x7f007f00", "b": "0xc000c000", "c": "0x7b807b80"}  # 2^127, -2 and 2^120 as pairs of bf16
        moves = [f"mov.b32 {name}, {value};" for name, value in constants.items()]
        return "{ .reg .b32 t, s, a, b, c; " + " ".join(moves + lines) + " }"

    @triton.jit
    def unpack(w, KIND: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
        """Words int32 (..., 4) -> their values, DTYPE (..., 4, 2 [, 2, 2]), whose axes are the word's high bit and the
        value's low bit e, then the word's low bit and the rest of the value's index. int4 comes as q, with ASM as
        2^-133 q where the value's second bit is 0 and as 2^-129 q where it is 1: subnormal, which tensor cores take.
        int8 comes with ASM as 2^-6 q, mxfp4 as 2^-126 times its value and fp8, if `small`, as 2^-120 times.

        Two neighbouring words go through each piece of assembly (pack=2), and a register of two 16-bit results is one
        output's value for both of them: what was the word's low bit is e afterwards.
        """
        if ASM is None:
            low, high = tl.split(w.reshape(w.shape[0], w.shape[1], w.shape[2], w.shape[3], w.shape[4], 2, 2))
            e = tl.arange(0, 2)[None, None, None, None, None, None, :]
            low, high = tl.expand_dims(low, 6), tl.expand_dims(high, 6)
            if KIND == "int4" or KIND == "mxfp4":
                l0, l1, l2, l3 = _nibbles(low >> (16 * e), KIND, DTYPE)
                h0, h1, h2, h3 = _nibbles(high >> (16 * e), KIND, DTYPE)
                out = tl.join(join4(l0, l2, h0, h2), join4(l1, l3, h1, h3))
            elif KIND == "fp":
                low, high = (low >> (16 * e)).to(tl.int16), (high >> (16 * e)).to(tl.int16)
                out = tl.join(low.to(DTYPE, bitcast=True), high.to(DTYPE, bitcast=True))
            else:
                out = join4(
                    _byte(low >> (8 * e), KIND, DTYPE),
                    _byte(low >> (8 * e + 16), KIND, DTYPE),
                    _byte(high >> (8 * e), KIND, DTYPE),
                    _byte(high >> (8 * e + 16), KIND, DTYPE),
                )
        elif KIND == "int4" or KIND == "mxfp4":
            a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
                ASM, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r", [w], (tl.bfloat16,) * 8, is_pure=True, pack=2
            )
            out = tl.join(join4(a, c, e, g), join4(b, d, f, h))
        elif KIND == "fp8" and tl.float16 == DTYPE:
            a, b, c, d = tl.inline_asm_elementwise(
                FP8_HALVES, "=&r,=&r,=&r,=&r,r,r", [w], (tl.float16,) * 4, is_pure=True, pack=2
            )
            out = join4(a, b, c, d)
        elif KIND == "fp":
            move: tl.constexpr = "mov.b32 $0, $2; mov.b32 $1, $3;"
            a, b = tl.inline_asm_elementwise(move, "=&r,=&r,r,r", [w], (tl.bfloat16,) * 2, is_pure=True, pack=2)
            out = tl.join(a, b).to(DTYPE, bitcast=True)
        else:
            a, b, c, d = tl.inline_asm_elementwise(
                ASM, "=&r,=&r,=&r,=&r,r,r", [w], (tl.bfloat16,) * 4, is_pure=True, pack=2
            )
            out = join4(a, b, c, d)
        return out

    @triton.jit
    def halves(w, DTYPE: tl.constexpr):
        """The two 16-bit values of each word, as fp32."""
        if tl.bfloat16 == DTYPE:
            low, high = (w << 16).to(tl.float32, bitcast=True), (w & -65536).to(tl.float32, bitcast=True)
        else:
            low = w.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
            high = (w >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
        return low, high

    @triton.jit
    def _byte(w, KIND: tl.constexpr, DTYPE: tl.constexpr):
        w = w.to(tl.int8)
        return w.to(DTYPE) if KIND == "int8" else w.to(tl.float8e4nv, bitcast=True).to(DTYPE)

    @triton.jit
    def _nibbles(w, KIND: tl.constexpr, DTYPE: tl.constexpr):
        """The values of a word's four lowest nibbles: q, or e2m1's."""
        a, b, c, d = w & 15, w >> 4 & 15, w >> 8 & 15, w >> 12 & 15
        if KIND == "mxfp4":
            a, b, c, d = twice(a) * 0.5, twice(b) * 0.5, twice(c) * 0.5, twice(d) * 0.5
        return a.to(DTYPE), b.to(DTYPE), c.to(DTYPE), d.to(DTYPE)

    @triton.jit
    def twice(q):
        """Twice the values of e2m1's bits q in 0..15, as integers."""
        exponent = q >> 1 & 3
        magnitude = tl.where(exponent == 0, q & 1, (q & 1) + 2 << tl.maximum(exponent, 1) - 1)
        return tl.where(q > 7, -magnitude, magnitude)

    @triton.jit
    def power(exponent):
        """2^(e - 127) of e8m0's bytes, fp32."""
        return tl.maximum(exponent.to(tl.int32) << 23, 1 << 22).to(tl.float32, bitcast=True)

    @triton.jit
    def scaled(
        a, s, KIND: tl.constexpr, PAIRS: tl.constexpr, S: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr
    ):  # fmt: skip
        """Values of 8 bits and their groups' scales, or (scale, zero) pairs of dtype S, as values in DTYPE; of int8
        with ASM, both in 64ths."""
        if PAIRS:
            scale, zero = halves(s, S)
            a = a.to(tl.float32) * scale + zero * (1 / 64 if KIND == "int8" and ASM is not None else 1.0)
        else:
            a = a.to(tl.float32) * s.to(tl.float32)
        return a.to(DTYPE)
