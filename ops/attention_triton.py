"""Causal attention of 1 to 16 new tokens a row over a static cache, on an NVIDIA GPU, in one kernel: norms, RoPE, cache
write, split-KV attention over keys and values in 16 or 8 bits, and the combination of the splits.

    attention_triton(qkv, k_cache, v_cache, ...)    one launch; see attention.py, whose axes and letters these are
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ops import kv_cache, softmax, unpacking, warps
from ops.common import counters, op, pdl, tl, tlx, triton
from ops.fragments import flat, unflat
from ops.rotary import gains, turned, turns

if triton is not None:

    @triton.jit
    def _words(memory):
        """A pointer, aligned as loads of 16 bytes want it, to memory as int32."""
        return tl.multiple_of(memory.to(tl.pointer_type(tl.int32)), 16)

    @triton.jit
    def _cached(cache, t0, t, d, at, begin, end, D: tl.constexpr, DP: tl.constexpr, STRIDE: tl.constexpr, other=0):
        """Words of keys or values of a head at positions begin <= t0 + t < end, features d < D, elsewhere `other` ones.

        at: t STRIDE + d, in 64 bits before constants are added, which so become part of a lane's instructions."""
        wanted = (t >= begin - t0) & (t < end - t0)
        if D < DP:
            wanted &= d < D
        return tl.load(cache + t0.to(tl.int64) * STRIDE + at, mask=wanted, other=other, cache_modifier=".cg")

    @triton.jit
    def _scaled(scales, t0, t, at, end):
        """Pairs of scales from position t0 + t on, where that is before the end."""
        out = 0
        if scales is not None:
            out = tl.load(scales + t0 // 2 + at, mask=t < end - t0, other=0, cache_modifier=".cg")
        return out

    @triton.jit
    def _per_key(pairs, factor, W: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr):
        """Scales times a factor as scores have them, (W, ROWS, KEYS)."""
        pairs = unflat(pairs, W, 1, 1).reshape(4, 8, W, KEYS // 8)
        low, high = (pairs << 16).to(tl.float32, bitcast=True), (pairs & -65536).to(tl.float32, bitcast=True)
        out = (tl.join(low, high) * factor).permute(2, 1, 3, 0, 4).reshape(W, 1, 8, KEYS)
        return tl.broadcast_to(out, (W, ROWS // 8, 8, KEYS)).reshape(W, ROWS, KEYS)

    @triton.jit
    def _byte(w, KIND: tl.constexpr, DTYPE: tl.constexpr):
        """The values in the lowest bits of words."""
        if KIND == "16-bit":
            out = w.to(tl.int16).to(DTYPE, bitcast=True)
        elif KIND == "int8":
            out = ((w & 255) - 128).to(DTYPE)
        else:
            out = w.to(tl.int8).to(tl.float8e4nv, bitcast=True).to(DTYPE)
        return out

    @triton.jit
    def _keys(
        tile, W: tl.constexpr, X: tl.constexpr, KEYS: tl.constexpr, KIND: tl.constexpr, DTYPE: tl.constexpr,
        ASM: tl.constexpr,
    ):  # fmt: skip
        """A key tile as the second operand of its product, (W, DP, KEYS). Features are (X j r h e), of which a lane has
        registers (r h) of values e, and come as (X r j h e): Triton wants h behind j in operands that tl.join made."""
        P: tl.constexpr = 1 if KIND == "16-bit" else 2
        Y: tl.constexpr = KEYS // 8
        w = unflat(tile, W, Y, X)  # (j i W Y X u)
        if ASM is None:
            w = w.reshape(4, 8, W, Y, X, 2, 1, 2, 1)
            e = tl.arange(0, 2)[None, None, None, None, None, None, :, None, None]
            p = tl.arange(0, P)[None, None, None, None, None, None, None, None, :]
            k = _byte(w >> (e + 2 * p) * (16 // P), KIND, DTYPE)
        elif KIND == "16-bit":  # two neighbouring words at once: a register has two values of one of them
            a, b = tl.inline_asm_elementwise(ASM, "=&r,=&r,r,r", [w], (tl.bfloat16,) * 2, is_pure=True, pack=2)
            k = tl.join(a, b).to(DTYPE, bitcast=True)
        else:
            a, b, c, d = tl.inline_asm_elementwise(
                ASM, "=&r,=&r,=&r,=&r,r,r", [w], (tl.bfloat16,) * 4, is_pure=True, pack=2
            )
            k = unpacking.join4(a, b, c, d).to(DTYPE, bitcast=True)
        k = k.reshape(4, 8, W, Y, X, 2, 2, 2, P).permute(2, 4, 5, 7, 8, 0, 6, 3, 1)
        return k.reshape(W, X * 2 * P, 2, 4, 2, KEYS).permute(0, 1, 3, 2, 4, 5).reshape(W, X * P * 32, KEYS)

    @triton.jit
    def _values(
        tile, W: tl.constexpr, Z: tl.constexpr, KEYS: tl.constexpr, KIND: tl.constexpr, DTYPE: tl.constexpr,
        ASM: tl.constexpr,
    ):  # fmt: skip
        """A value tile as the second operand of its product, (W, KEYS, DP). A register has a feature of two keys."""
        F: tl.constexpr = 2 if KIND == "16-bit" else 4  # values of a word
        Y: tl.constexpr = KEYS // 8
        U: tl.constexpr = tile.shape[1]
        w = unflat(tile, W, 2 * Y, Z).reshape(4, 8, W, Y, 2, Z, U // 2, 2)  # (j i W Y e Z uh ul)
        if ASM is None:
            f = tl.arange(0, F)[None, None, None, None, None, None, None, None, :]
            w = w.permute(0, 1, 2, 3, 5, 6, 4, 7).reshape(4, 8, W, Y, Z, U // 2, 2, 2, 1)
            v = _byte(w >> f * (32 // F), KIND, DTYPE)
        else:
            first, second = tl.split(w.permute(0, 1, 2, 3, 5, 6, 7, 4))
            if KIND == "16-bit":
                a, b, c, d = tl.inline_asm_elementwise(
                    ASM, "=&r,=&r,=&r,=&r,r,r,r,r", [first, second], (tl.bfloat16,) * 4, is_pure=True, pack=2
                )
                v = unpacking.join4(a, b, c, d)
            else:
                a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
                    ASM, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r", [first, second], (tl.bfloat16,) * 8, is_pure=True,
                    pack=2,
                )  # fmt: skip
                v = tl.join(unpacking.join4(a, c, e, g), unpacking.join4(b, d, f, h))
            v = v.to(DTYPE, bitcast=True)
        v = v.reshape(4, 8, W, Y // 2, 2, Z, U // 2, 2, 2, F)  # (j i W Y/2 y Z uh e ul f)
        return v.permute(2, 3, 0, 4, 7, 5, 6, 8, 9, 1).reshape(W, KEYS, Z * U * F * 8)

    @triton.jit
    def _seen(scores, t, end, last, window):
        """Scores of keys at positions t (W, 1, KEYS), of which rows see those up to `last`, and which those are."""
        seen = (t < end) & (t <= last) & ((window <= 0) | (t > last - window))
        return tl.where(seen, scores, float("-inf")), seen

    @triton.jit
    def _softmax_step(scores, l_i, m_i):
        """Each warp's online softmax (Milakov and Gimelshein, arXiv:1805.02867) with its next scores (W, ROWS, KEYS):
        their weights, the sums l_i and maxima m_i (W, ROWS), and the factor for what was summed before."""
        m_new = tl.maximum(m_i, tl.max(scores, 2))
        safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row that has seen nothing yet
        p = tl.exp2(scores - safe[:, :, None])
        alpha = tl.exp2(m_i - safe)
        return p, l_i * alpha + tl.sum(p, 2), m_new, alpha[:, :, None]

    @triton.jit
    def _together(m, l, m_too, l_too):
        """The larger of two maxima, and the sums that belong to them there."""
        top = tl.maximum(m, m_too)
        safe = tl.where(top == float("-inf"), 0.0, top)
        return top, l * tl.exp2(m - safe) + l_too * tl.exp2(m_too - safe)

    @triton.jit
    def _over_warps(acc, m_i, l_i, v_new, m_new, place, LEFT: tl.constexpr, PTX: tl.constexpr):
        """What warps have found for the first LEFT rows, and what the new key adds, in one exchange: sums of values
        (LEFT, DP), features in order, and their maxima and sums of weights, (LEFT, 1), as `_together` has them.

        acc (W, ROWS, DP), whose feature d is place[d] of the last axis, m_i and l_i (W, ROWS); v_new (ROWS or 1, DP)
        likewise and m_new (ROWS,). PTX: lanes have acc as tensor cores leave it."""
        W: tl.constexpr = acc.shape[0]
        ROWS: tl.constexpr = acc.shape[1]
        DP: tl.constexpr = acc.shape[2]
        PITCH: tl.constexpr = DP + 4  # rows, which lanes have, begin in different banks
        y_box = warps.box((W + 1) * LEFT * (PITCH + 2))
        m_box = y_box + (W + 1) * LEFT * PITCH * 4
        row = tl.arange(0, ROWS)
        own = tl.arange(0, W)[:, None] * LEFT + row[None, :]
        there = tl.broadcast_to((row < LEFT)[None, :], own.shape)
        n = tl.arange(0, DP)
        to = y_box + (own[:, :, None] * PITCH + n[None, None, :]) * 4
        warps.leave_pairs(to, acc, tl.broadcast_to(there[:, :, None], acc.shape), ROWS == 8 and PTX)
        warps.leave(m_box + own * 8, m_i, there)
        warps.leave(m_box + own * 8 + 4, l_i, there)
        own, there = row + W * LEFT, tl.broadcast_to((row < LEFT)[:, None], (ROWS, DP))
        to = y_box + (own[:, None] * PITCH + n[None, :]) * 4
        warps.leave(to, tl.broadcast_to(v_new, (ROWS, DP)), there)
        warps.leave(m_box + own * 8, m_new, row < LEFT)
        tl.debug_barrier()
        row, n = tl.arange(0, LEFT)[:, None], place[None, :]
        new = row + W * LEFT
        m = warps.take(m_box + new * 8)
        for warp in tl.static_range(W):
            m = tl.maximum(m, warps.take(m_box + (row + warp * LEFT) * 8))
        top = tl.where(m == float("-inf"), 0.0, m)
        l = tl.exp2(warps.take(m_box + new * 8) - top)
        y = warps.take(y_box + (new * PITCH + n) * 4) * l
        for warp in tl.static_range(W):
            own = row + warp * LEFT
            share = tl.exp2(warps.take(m_box + own * 8) - top)
            l += warps.take(m_box + own * 8 + 4) * share
            y += warps.take(y_box + (own * PITCH + n) * 4) * share
        return y, m, l

    @triton.jit
    def _combine(
        out, sinks, place, splits, block, in_order, S, Hkv, h, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
        ROWS: tl.constexpr, REAL: tl.constexpr, SPLITS: tl.constexpr, SPLITS2: tl.constexpr, PARTS: tl.constexpr,
    ):  # fmt: skip
        """What the splits of a block of rows have left at `place` (SPLITS, ROWS, DP + 2), as their attention. REAL of
        the rows may be in use; SPLITS2 is SPLITS padded to a power of two, PARTS how many are read at once."""
        r = tl.arange(0, REAL)
        row = block * ROWS + r
        n = tl.arange(0, DP)
        of_part = place + r[None, :] * (DP + 2)
        part = tl.arange(0, SPLITS2)[:, None]
        at = of_part + part * (ROWS * (DP + 2)) + DP
        there = (part < splits) & (row < S * G)[None, :]
        m = tl.load(at, mask=there, other=float("-inf"), cache_modifier=".cg")
        l = tl.load(at + 1, mask=there, other=0.0, cache_modifier=".cg")
        m, l = tl.reduce((m, l), 0, _together)
        m = tl.where(m == float("-inf"), 0.0, m)
        if sinks is not None:
            l = softmax.with_sink(l, m, softmax.sinks_of(sinks, h * G + row % G, row < S * G))
        y = tl.zeros((REAL, DP), tl.float32)
        for first in tl.static_range(0, SPLITS, PARTS):
            part = first + tl.arange(0, PARTS)[:, None]
            at = of_part + part * (ROWS * (DP + 2))
            there = (part < splits) & (row < S * G)[None, :]
            own_m = tl.load(at + DP, mask=there, other=float("-inf"), cache_modifier=".cg")
            own_y = tl.load(at[:, :, None] + n[None, None, :], there[:, :, None], 0.0, cache_modifier=".cg")
            y += tl.sum(own_y * tl.exp2(own_m - m[None, :])[:, :, None], 0)
        to = (row // G * (Hkv * G) + h * G + row % G)[:, None] * D + in_order[None, :]
        mask = (row < S * G)[:, None] & (in_order < D)[None, :]
        tl.store(out + to, (y / l[:, None]).to(out.dtype.element_ty), mask=mask)

    @triton.jit
    def _prefetch(memory, lines, W: tl.constexpr):
        """Ask for the first so many lines of 128 bytes of memory to come to the L2 cache, each program for its part."""
        programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
        program = tl.program_id(0) + tl.num_programs(0) * (tl.program_id(1) + tl.num_programs(1) * tl.program_id(2))
        lane = tl.arange(0, W * 32)
        for i in range(program * (W * 32), lines, programs * (W * 32)):
            at = memory.to(tl.int64) + tl.minimum(i + lane, lines - 1).to(tl.int64) * 128
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], tl.int32, is_pure=False, pack=1
            )

    @triton.jit(do_not_specialize=["first_layer"])
    def _attention_kernel(
        out, qkv, k_cache, v_cache, k_scales, v_scales, input_pos, rope, q_norm, k_norm, sinks, partial, counts,
        prefetch, lines, first_layer, S, T, Hkv, window, max_position, scale, cap, eps, stride_b, stride_h, scales_b,
        scales_h,
        G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROTARY: tl.constexpr, ROWS: tl.constexpr, NEW: tl.constexpr,
        STRIDE: tl.constexpr, W: tl.constexpr, ONCE: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr,
        SPLITS2: tl.constexpr, SPLIT_KEYS: tl.constexpr, PARTS: tl.constexpr, REAL: tl.constexpr, TILES: tl.constexpr,
        KIND: tl.constexpr, K_ASM: tl.constexpr, V_ASM: tl.constexpr, BIAS: tl.constexpr, UNIT: tl.constexpr,
        LIFT: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """ROWS query rows (new token s, head g) of one key head, on one KV split; KEYS a warp and step.

        The keys in the cache are cut into splits of at least SPLIT_KEYS, at most SPLITS; programs without one leave at
        once. The last split's program also writes the new keys and values and attends to them. Each leaves its part in
        memory, and the program that comes last combines them (flash decoding without a second launch). As in the
        linear kernel, tiles of keys and values are loaded as fragments, by permuting what the dot products sum over,
        the keys of a warp or, for values, the features. They stay words until they are used, TILES of them on their
        way: a tile's registers are loaded anew as soon as it has been widened.

        Positions and old keys come from before the model's first layer, whose attention (`first_layer`) lets no other
        kernel start until all that comes before has ended: in later layers they need not wait.

        KIND is the cache's, and what `kv_cache.widening` says of it: products are of DTYPE, of keys and values plus
        BIAS times UNIT. A scale belongs to a key, and is multiplied with its score or its weight.

        Axes of tiles: j, i lanes and W warps as in fragments.py, u a lane's neighbouring words; X and Y repetitions
        along the features and the keys of a key tile; Z along the features of a value tile; DP is D padded to a power
        of two. Key 2 Y j + 2 y + e of a warp is column 2 j + e of the y-th 8 scores: a lane has neighbouring scales.
        """
        DTYPE: tl.constexpr = tl.float16 if KIND == "fp8" else qkv.dtype.element_ty
        F: tl.constexpr = 2 if KIND == "16-bit" else 4  # values of a word
        X: tl.constexpr = DP // F // 16
        Y: tl.constexpr = KEYS // 8
        U: tl.constexpr = 4 if DP // F >= 32 else 2
        Z: tl.constexpr = DP // F // U // 8
        STEP: tl.constexpr = W * KEYS
        head = tl.program_id(0)  # (b, hkv)
        split = tl.program_id(1)
        block = tl.program_id(2)
        b = head // Hkv
        h = head % Hkv
        if PDL:
            if first_layer != 0:
                tlx.gdc_wait()
            tlx.gdc_launch_dependents()
        pos = tl.load(input_pos + b, cache_modifier=".cg").to(tl.int32)
        first = tl.where(window > 0, tl.maximum(pos - window + 1, 0), 0)
        start = first // 16 * 16
        old = tl.minimum(pos, T) - start
        split_keys = tl.maximum(tl.cdiv(tl.cdiv(old, SPLITS), 16) * 16, SPLIT_KEYS)
        splits = tl.maximum(tl.cdiv(old, split_keys), 1)
        if split >= splits:
            if prefetch is not None:
                tlx.gdc_wait()
                _prefetch(prefetch, lines, W)
            return

        base = b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h
        keys, values = k_cache + base, v_cache + base
        k_words, v_words = _words(keys), _words(values)
        k_pairs, v_pairs = None, None
        if KIND != "16-bit":
            base = b.to(tl.int64) * scales_b + h.to(tl.int64) * scales_h
            k_scales += base
            v_scales += base
            k_pairs, v_pairs = _words(k_scales), _words(v_scales)
        begin = tl.multiple_of(start + split * split_keys, 16)
        end = tl.minimum(begin + split_keys, start + old)

        j = tl.arange(0, 4)[:, None, None, None, None, None]
        i = tl.arange(0, 8)[None, :, None, None, None, None]
        warp = tl.arange(0, W)[None, None, :, None, None, None] * KEYS
        key = warp + i // 2 * (2 * Y) + i % 2 + tl.arange(0, Y)[None, None, None, :, None, None] * 2
        word = tl.arange(0, X)[None, None, None, None, :, None] * 16 + j * 4
        word += tl.arange(0, 4)[None, None, None, None, None, :]
        at_k = flat(key.to(tl.int64) * (STRIDE // F) + word, W, Y, X)
        key_of_k, word_of_k = flat(key, W, Y, X), flat(word, W, Y, X)
        key = warp + j * (2 * Y) + tl.arange(0, 2 * Y)[None, None, None, :, None, None]
        word = tl.arange(0, Z)[None, None, None, None, :, None] * (8 * U) + i * U
        word += tl.arange(0, U)[None, None, None, None, None, :]
        at_v = flat(key.to(tl.int64) * (STRIDE // F) + word, W, 2 * Y, Z)
        key_of_v, word_of_v = flat(key, W, 2 * Y, Z), flat(word, W, 2 * Y, Z)
        key = warp + j * (2 * Y)
        pair = tl.arange(0, Y)[None, None, None, None, None, :]
        at_s, key_of_s = flat(key // 2 + pair, W, 1, 1), flat(key, W, 1, 1)
        n = tl.arange(0, KEYS)[None, None, :]
        key_of_p = tl.arange(0, W)[:, None, None] * KEYS + n % 8 // 2 * (2 * Y) + n // 8 * 2 + n % 2
        DW: tl.constexpr = D // F
        DPW: tl.constexpr = DP // F
        SW: tl.constexpr = STRIDE // F
        k_tile = _cached(k_words, begin, key_of_k, word_of_k, at_k, first, end, DW, DPW, SW)
        k_scale = _scaled(k_pairs, begin, key_of_s, at_s, end)
        v_tile = _cached(v_words, begin, key_of_v, word_of_v, at_v, first, end, DW, DPW, SW)
        v_scale = _scaled(v_pairs, begin, key_of_s, at_s, end)
        if TILES == 2:
            k_next = _cached(k_words, begin + STEP, key_of_k, word_of_k, at_k, first, end, DW, DPW, SW)
            k_scale_next = _scaled(k_pairs, begin + STEP, key_of_s, at_s, end)
            v_next = _cached(v_words, begin + STEP, key_of_v, word_of_v, at_v, first, end, DW, DPW, SW)
            v_scale_next = _scaled(v_pairs, begin + STEP, key_of_s, at_s, end)
        row = block * ROWS + tl.arange(0, ROWS)
        last = pos + row // G  # the last key that a row sees
        # One new key for every row of queries again, so that no warp waits for another's part of it, where its program
        # has the registers.
        COPIES: tl.constexpr = ROWS if W == 8 else 1
        if NEW == 1:
            new, writes = tl.zeros((COPIES,), tl.int32), tl.arange(0, COPIES) == 0
        else:
            new = tl.arange(0, NEW)
            writes = new < S
        q_turns = turns(rope, last, max_position, DP, ROTARY)
        k_turns = turns(rope, pos + new, max_position, DP, ROTARY)
        q_gain, k_gain = gains(q_norm, D, DP), gains(k_norm, D, DP)
        LEFT: tl.constexpr = REAL if ONCE else ROWS
        left = block * ROWS + tl.arange(0, LEFT)
        sink = softmax.sinks_of(sinks, h * G + left % G, left < S * G)
        if PDL:
            tlx.gdc_wait()

        # All that the kernel before has written is asked for at once.
        n = tl.arange(0, DP)
        in_order = n // (8 * U * F) * (8 * U * F) + n % 8 * (U * F) + n // 8 % (U * F)  # as acc has features
        d = in_order if NEW == 1 else n
        width = (Hkv * (G + 2)) * D
        base = qkv + b.to(tl.int64) * S * width
        q_rows = base + row // G * width + (h * G + row % G) * D
        k_rows = base + new * width + (Hkv * G + h) * D
        ours = (new < S)[:, None] & (split == splits - 1)
        q = tl.load(q_rows[:, None] + n[None, :], mask=(row < S * G)[:, None] & (n < D)[None, :], other=0.0)
        k_new = tl.load(k_rows[:, None] + n[None, :], mask=ours & (n < D)[None, :], other=0.0)
        v_new = tl.load((k_rows + Hkv * D)[:, None] + d[None, :], mask=ours & (d < D)[None, :], other=0.0)
        if prefetch is not None:
            _prefetch(prefetch, lines, W)
        q = turned(q, q_turns, q_gain, eps, D, DP, ROTARY, q_norm is not None)

        # Warps go through their keys by themselves, and are put together at the end.
        m_i = tl.full((W, ROWS), float("-inf"), tl.float32)
        l_i = tl.zeros((W, ROWS), tl.float32)
        acc = tl.zeros((W, ROWS, DP), tl.float32)
        m_new = tl.full((ROWS,), float("-inf"), tl.float32)  # of one new key, which is put to them last
        v_last = tl.zeros((COPIES, DP), tl.float32)
        if split == splits - 1:
            k_new = turned(k_new, k_turns, k_gain, eps, D, DP, ROTARY, k_norm is not None)
            at = (pos + new).to(tl.int64)[:, None] * STRIDE
            written = writes & (pos + new < T)
            to_k, to_v = written[:, None] & (n < D)[None, :], written[:, None] & (d < D)[None, :]
            if KIND == "16-bit":
                k_own, v_own = k_new.to(tl.float32), v_new.to(tl.float32)  # as the cache has them
                k_code, v_code = k_new.to(k_cache.dtype.element_ty), v_new.to(v_cache.dtype.element_ty)
            else:
                k_code, of_k, k_own = kv_cache.encode(k_new.to(tl.float32), KIND)
                v_code, of_v, v_own = kv_cache.encode(v_new.to(tl.float32), KIND)
                tl.store(k_scales + pos + new, of_k.to(tl.bfloat16), mask=written)
                tl.store(v_scales + pos + new, of_v.to(tl.bfloat16), mask=written)
            tl.store(keys + at + n[None, :], k_code, mask=to_k)
            tl.store(values + at + d[None, :], v_code, mask=to_v)
            if NEW == 1:
                score = softmax.scores(tl.sum(q.to(tl.float32) * k_own, 1), scale, cap)
                m_new = tl.where(pos < T, score, float("-inf"))
                v_last = v_own
            else:  # read back as part of a tile: faster than more products
                tl.debug_barrier()
                end = tl.minimum(pos + S, T)
                k_tile = _cached(k_words, begin, key_of_k, word_of_k, at_k, pos, end, DW, DPW, SW, k_tile)
                k_scale = _scaled(k_pairs, begin, key_of_s, at_s, end)
                v_tile = _cached(v_words, begin, key_of_v, word_of_v, at_v, pos, end, DW, DPW, SW, v_tile)
                v_scale = _scaled(v_pairs, begin, key_of_s, at_s, end)

        q = q.reshape(ROWS, X, 4, F, 2, 2).permute(0, 1, 3, 2, 4, 5).reshape(1, ROWS, DP)  # as `_keys` has features
        if KIND == "fp8":  # a query that large sees one key alone
            q = tl.clamp(q.to(tl.float32), -65504.0, 65504.0)
        OF_Q: tl.constexpr = LIFT if UNIT < 1.0 else 1.0
        if UNIT < 1.0:
            q *= OF_Q
        q = tl.broadcast_to(q.to(DTYPE), (W, ROWS, DP))
        # What products begin with: what the bias makes of them, taken off. Zero otherwise, which brings q to registers
        # before the loop, if they have room for it.
        unbiased = tl.zeros((W, ROWS, KEYS), tl.float32)
        if BIAS > 0.0 or TILES == 2:
            biases = tl.dot(q, tl.full((W, DP, 8), BIAS * UNIT, tl.float32).to(DTYPE))  # a small bf16 would be 0
            unbiased = tl.broadcast_to(-biases[:, :, None, :], (W, ROWS, Y, 8)).reshape(W, ROWS, KEYS)
        sums = tl.zeros((W, ROWS, 8), tl.float32)  # of weights, times the bias
        if KIND == "16-bit":
            of_scores = scale
        else:
            of_scores = 1.0
        last = last[None, :, None]
        for t0 in range(begin, end, TILES * STEP):
            for tile in tl.static_range(TILES):
                t = tl.multiple_of(t0, 16) + tile * STEP
                following = t + TILES * STEP
                products = tl.dot(q, _keys(k_tile, W, X, KEYS, KIND, DTYPE, K_ASM), unbiased)
                if KIND != "16-bit":
                    products *= _per_key(k_scale, scale / (UNIT * OF_Q), W, ROWS, KEYS)
                if following < end:  # otherwise most of a short context's instructions would load nothing
                    k_scale = _scaled(k_pairs, following, key_of_s, at_s, end)
                    k_tile = _cached(k_words, following, key_of_k, word_of_k, at_k, first, end, DW, DPW, SW)
                scores, seen = _seen(softmax.scores(products, of_scores, cap), t + key_of_p, end, last, window)
                p, l_i, m_i, alpha = _softmax_step(scores, l_i, m_i)
                if KIND != "16-bit":
                    p = tl.where(seen, p * _per_key(v_scale, LIFT, W, ROWS, KEYS), 0.0)
                p = p.to(DTYPE).reshape(W, ROWS, Y // 2, 2, 4, 2).permute(0, 1, 2, 4, 3, 5).reshape(W, ROWS, KEYS)
                acc = tl.dot(p, _values(v_tile, W, Z, KEYS, KIND, DTYPE, V_ASM), acc * alpha)
                if BIAS > 0.0:
                    sums = tl.dot(p, tl.full((W, KEYS, 8), BIAS * UNIT, tl.float32).to(DTYPE), sums * alpha)
                if following < end:
                    v_scale = _scaled(v_pairs, following, key_of_s, at_s, end)
                    v_tile = _cached(v_words, following, key_of_v, word_of_v, at_v, first, end, DW, DPW, SW)
                if TILES == 2:
                    k_tile, k_next = k_next, k_tile
                    v_tile, v_next = v_next, v_tile
                    if KIND != "16-bit":
                        k_scale, k_scale_next = k_scale_next, k_scale
                        v_scale, v_scale_next = v_scale_next, v_scale
        if BIAS > 0.0:
            acc = (acc.reshape(W, ROWS, DP // 8, 8) - sums[:, :, None, :]).reshape(W, ROWS, DP)
        if KIND != "16-bit":
            acc *= 1.0 / (UNIT * LIFT)
        order = in_order
        if ONCE:
            at_feature = n // (8 * U * F) * (8 * U * F) + n % (U * F) * 8 + n // (U * F) % 8
            y, m, l = _over_warps(acc, m_i, l_i, v_last, m_new, at_feature, LEFT, PDL)
            order = n
        else:
            m, l = tl.reduce((m_i, l_i), 0, _together)
            m, l = _together(m, l, m_new, tl.where(m_new == float("-inf"), 0.0, 1.0))
            top = tl.where(m == float("-inf"), 0.0, m)
            share, of_new = tl.exp2(m_i - top[None, :]), tl.exp2(m_new - top)
            y = (acc * share[:, :, None]).permute(1, 2, 0)  # (ROWS, DP, W)
            HALVINGS: tl.constexpr = 3 if W == 8 else 2 if W == 4 else 1
            for part in tl.static_range(HALVINGS):  # splitting brings what warps hold together: a sum is slower
                even, odd = tl.split(y.reshape(ROWS, DP, W >> (part + 1), 2))
                y = even + odd
            y = y.reshape(ROWS, DP) + of_new[:, None] * v_last
            m, l = m[:, None], l[:, None]

        of_row = (((b * S + left // G).to(tl.int64) * (Hkv * G) + h * G + left % G) * D)[:, None]
        seen = (left < S * G)[:, None]
        mask = seen & (order < D)[None, :]
        if SPLITS > 1 and splits > 1:
            # The program that comes last finds what all have left, and combines it in the order of the splits.
            group = head * tl.num_programs(2) + block
            place = partial + group.to(tl.int64) * (SPLITS * ROWS * (DP + 2))
            own = place + (split * ROWS + tl.arange(0, LEFT))[:, None] * (DP + 2)
            tl.store(own + n[None, :], y, mask=mask)
            tl.store(own + DP, m, mask=seen)
            tl.store(own + DP + 1, l, mask=seen)
            tl.debug_barrier()
            if tl.atomic_add(counts + group, 1, sem="acq_rel") < splits - 1:
                return
            tl.store(counts + group, 0)
            base = out + b.to(tl.int64) * S * (Hkv * G) * D
            _combine(base, sinks, place, splits, block, order, S, Hkv, h, G, D, DP, ROWS, REAL, SPLITS, SPLITS2, PARTS)
        else:
            if sinks is not None:
                l = softmax.with_sink(l, m, sink[:, None])
            tl.store(out + of_row + order[None, :], (y / l).to(out.dtype.element_ty), mask=mask)


# Bytes of weights to prefetch: of those that are read soon, a third of what exceeds what the next kernels' first
# programs ask for by themselves, and at most so many. Measured on an H100 and an H200, where more, or before the wait,
# was slower. Much of the gain is the wait of the programs that do it: the next kernel's weights let those before pass.
# (An H200 reads what was brought to its L2 cache hardly faster than DRAM: 16 MB in 7.0 us, and in 7.5.)
PREFETCH, EARLY = 2**21, 14 * 2**20
# And of those that are read behind a mixture's experts, where they are twice as many: with fewer, as 4 bits have, whole
# generations were 3 % slower.
LATER = 2**22
FEW = 66  # programs without a split, up to which one a multiprocessor, of twice the warps, is faster
MANY = 132  # and from which three are, but for caches in 8 bits
SHARED = 48 * 1024  # bytes of shared memory that a kernel has without asking for more
# KV splits of all rows and heads: what the multiprocessors hold, one, two or three each.
ONE_EACH, TWO_EACH, THREE_EACH = 132, 264, 396


def prefetch_lines(soon: Tensor | None, later: Tensor | None) -> int:
    """How many lines of 128 bytes of these weights to bring to the L2 cache."""
    if soon is not None:
        return max(0, min((soon.nbytes - EARLY) // 3, PREFETCH)) // 128
    return 0 if later is None or later.nbytes < 2 * LATER else LATER // 128


class Plan(NamedTuple):
    """How programs go through their keys, as far as registers allow. Measured on an H200, in steps of whole models."""

    programs: int  # KV splits of all rows and heads, unless they are more without
    warps: int
    keys: int  # of a warp in a step
    tiles: int  # steps whose keys and values are on their way
    maxnreg: int | None
    split_keys: int = 128  # of a KV split, at least
    early: bool = True  # whether programs may take multiprocessors that the kernel before has left, while it goes on


def plan(kind: str, DP: int, S: int, groups: int) -> Plan:
    """For so many groups of rows and heads, each of which is a program or more."""
    wide, one = kind == "16-bit", S == 1 and DP <= 128
    if one and groups > TWO_EACH:  # small ones, so that all run at once; 52 us instead of 42 if they start early
        return Plan(groups, 2, 16 if wide else 32, 2 if wide else 1, None, early=False)
    if DP <= 128 and groups > MANY and (wide or not one):
        return Plan(THREE_EACH, 4, 16, 1, 168)
    if wide and one and groups <= FEW:  # up to 256 keys are one step, without KV splits, which wait for each other
        return Plan(ONE_EACH, 8, 32, 1, None, split_keys=256)
    return Plan(TWO_EACH, 4, 16 if wide or DP > 128 else 32, 2 if wide and one else 1, None)


def exchanges(hopper: bool, W: int, rows: int, real: int, DP: int) -> bool:
    """Whether warps may leave for each other what `_over_warps` says: beside the queries of all of them."""
    return hopper and (W + 1) * real * (DP + 6) * 4 + W * rows * DP * 2 <= SHARED


@op("attention", mutates=("k_cache", "v_cache", "k_scales", "v_scales"))
def attention_triton(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    input_pos: Tensor,
    rope: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    n_head: int,
    window: int,
    scale: float | None = None,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    prefetch: Tensor | None = None,
    prefetch_lines: int = 0,
    first_layer: bool = True,
) -> Tensor:
    """One launch of the attention kernel, S <= 16."""
    qkv = qkv.contiguous()
    B, S, _ = qkv.shape
    _, Hkv, T, D = k_cache.shape
    launch = pdl(qkv.device)
    prefetch = prefetch if launch["PDL"] else None
    G, DP = n_head // Hkv, max(64, triton.next_power_of_2(D))
    rows = 8 if S * G <= 8 else 16
    blocks = triton.cdiv(S * G, rows)
    real = min(rows, triton.next_power_of_2(G)) if S == 1 else rows
    groups, kind = B * Hkv * blocks, kv_cache.kind_of(k_cache)
    how = plan(kind, DP, S, groups)
    early = {"launch_pdl": how.early} if launch["PDL"] else {}
    splits = max(1, min(64, how.programs // groups, triton.cdiv(T, how.split_keys)))
    out = torch.empty(B, S, n_head * D, dtype=qkv.dtype, device=qkv.device)
    partial = torch.empty(groups * splits * rows * (DP + 2), dtype=torch.float32, device=qkv.device)
    lines = 0 if prefetch is None else prefetch_lines
    # Those without a KV split help to prefetch, where one row leaves most multiprocessors idle.
    programs = max(splits, 128 // groups) if lines and S == 1 else splits
    to = kv_cache.widening(kind, qkv.dtype, launch["PDL"])
    once = exchanges(launch["PDL"], how.warps, rows, real, DP)
    _attention_kernel[(B * Hkv, programs, blocks)](
        out, qkv, k_cache, v_cache, k_scales, v_scales, input_pos.contiguous(), rope, q_norm, k_norm, sinks, partial,
        counters(qkv.device, groups), prefetch, lines,
        int(first_layer), S, T, Hkv, window, 0 if rope is None else rope.shape[0] - 1,
        *softmax.constants(D**-0.5 if scale is None else scale, soft_cap), eps,
        *k_cache.stride()[:2], *(k_cache if k_scales is None else k_scales).stride()[:2], G=G, D=D, DP=DP,
        ROTARY=0 if rope is None else 2 * rope.shape[1], ROWS=rows, NEW=1 if S == 1 else 16, STRIDE=k_cache.stride(2),
        W=how.warps, ONCE=once, KEYS=how.keys, SPLITS=splits,
        SPLITS2=triton.next_power_of_2(splits), SPLIT_KEYS=how.split_keys,
        PARTS=min(64 // real, triton.next_power_of_2(splits)), REAL=real, TILES=how.tiles, KIND=kind,
        K_ASM=to.keys, V_ASM=to.values, BIAS=to.bias, UNIT=to.unit, LIFT=to.lift,
        num_warps=how.warps, num_stages=1, maxnreg=how.maxnreg, **launch | early,
    )  # fmt: skip
    return out
