"""Causal attention of many new tokens over a static cache, on an NVIDIA GPU: cost follows the keys that are seen.

    attention_prefill(qkv, k_cache, v_cache, ...)    norms, RoPE, cache write and attention; see attention.py

Two kernels: one reads qkv once, normalises, rotates, and writes keys and values to the cache; the other is flash
attention (Dao, arXiv:2307.08691) over the cache, of which a third one widens what is seen if it is in 8 bits. Whole
chunks of very long prompts go to prefill_cudnn.py. Axes: B rows, S new tokens, T cache length, H query heads, Hkv
key/value heads, G = H / Hkv, D head dim.
"""

import torch
from torch import Tensor

from ops import common, kv_cache, prefill_cudnn, softmax
from ops.common import op, tl, triton
from ops.rotary import gains, turned, turns

BLOCKS = {  # by the head dimension, up to: queries of a program, keys of a step, and how many steps' are on their way
    128: (128, 64, 3),
    256: (64, 32, 2),
    512: (64, 32, 1),
}
TOKENS, WIDENED = 16, 64  # of a program that rotates, or widens

if triton is not None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    @triton.jit(do_not_specialize=["start", "S", "T", "max_position"])
    def _rotate_kernel(
        q_out, k_cache, v_cache, k_scales, v_scales, qkv, input_pos, start, rope, q_norm, k_norm, S, T, max_position,
        eps, stride_b, stride_h, scales_b, scales_h, H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr,
        DP: tl.constexpr, ROTARY: tl.constexpr, STRIDE: tl.constexpr, TOKENS: tl.constexpr, KIND: tl.constexpr,
    ):  # fmt: skip
        """One head of TOKENS new tokens: queries go to q_out (B, S, H, D), keys and values to their caches."""
        head = tl.program_id(1)
        b = tl.program_id(2)
        pos = start
        if input_pos is not None:
            pos = tl.load(input_pos + b).to(tl.int32)
        s = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
        d = tl.arange(0, DP)[None, :]
        token = (b * S + s).to(tl.int64)[:, None]
        inside = (s < S)[:, None] & (d < D)
        x = tl.load(qkv + (token * (H + 2 * HKV) + head) * D + d, mask=inside, other=0.0)
        at = (pos + s)[:, None]
        cached = b.to(tl.int64) * stride_b + at.to(tl.int64) * STRIDE + d
        written = inside & (at < T)
        if head < H:
            angles = turns(rope, pos + s, max_position, DP, ROTARY)
            x = turned(x, angles, gains(q_norm, D, DP), eps, D, DP, ROTARY, q_norm is not None)
            tl.store(q_out + (token * H + head) * D + d, x, mask=inside)
        else:
            cache, scales, own = v_cache, v_scales, (head - H - HKV).to(tl.int64)
            if head < H + HKV:
                angles = turns(rope, pos + s, max_position, DP, ROTARY)
                x = turned(x, angles, gains(k_norm, D, DP), eps, D, DP, ROTARY, k_norm is not None)
                cache, scales, own = k_cache, k_scales, (head - H).to(tl.int64)
            if KIND == "16-bit":
                code = x.to(cache.dtype.element_ty)
            else:
                code, scale, _ = kv_cache.encode(x.to(tl.float32), KIND)
                to = scales + b.to(tl.int64) * scales_b + own * scales_h + pos + s
                tl.store(to, scale.to(tl.bfloat16), mask=(s < S) & (pos + s < T))
            tl.store(cache + cached + own * stride_h, code, mask=written)

    @triton.jit(do_not_specialize=["start", "S", "T"])
    def _widen_cache_kernel(
        out, cache, scales, input_pos, start, S, T, window, stride_b, stride_h, scales_b, scales_h, HKV: tl.constexpr,
        D: tl.constexpr, DP: tl.constexpr, STRIDE: tl.constexpr, KIND: tl.constexpr, TOKENS: tl.constexpr,
    ):  # fmt: skip
        """TOKENS keys or values of one head, of those that new tokens see: out (B, HKV, T, D)."""
        head, b = tl.program_id(1), tl.program_id(2)
        pos = start
        if input_pos is not None:
            pos = tl.load(input_pos + b).to(tl.int32)
        end = tl.minimum(pos + S, T)
        first = tl.where(window > 0, tl.maximum(pos - window + 1, 0), 0)
        t0 = tl.program_id(0) * TOKENS
        if (t0 >= end) | (t0 + TOKENS <= first):
            return
        t = t0 + tl.arange(0, TOKENS)
        d = tl.arange(0, DP)[None, :]
        seen = (t >= first) & (t < end)
        inside = seen[:, None] & (d < D)
        at = t.to(tl.int64)[:, None] * STRIDE + d
        bytes = (cache + b.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h).to(tl.pointer_type(tl.uint8))
        x = tl.load(tl.multiple_of(bytes, 16) + at, mask=inside, other=0)
        if KIND == "int8":
            x = x.to(tl.float32) - 128.0
        else:
            x = x.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        scale = tl.load(scales + b.to(tl.int64) * scales_b + head.to(tl.int64) * scales_h + t, mask=seen, other=0.0)
        to = ((b * HKV + head).to(tl.int64) * T + t)[:, None] * D + d
        tl.store(out + to, (x * scale.to(tl.float32)[:, None]).to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _step(q, k, v, acc, l_i, m_i, seen, scale, cap, MASKED: tl.constexpr):
        """One step of the online softmax (Milakov and Gimelshein, arXiv:1805.02867): keys k (D, N), values v (N, D)."""
        scores = tl.dot(q, k)
        if cap is not None or MASKED:
            scores = softmax.scores(scores, scale, cap)
            if MASKED:
                scores = tl.where(seen, scores, float("-inf"))
            m_new = tl.maximum(m_i, tl.max(scores, 1))
            safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row that has seen nothing yet
            p = tl.exp2(scores - safe[:, None])
        else:
            m_new = tl.maximum(m_i, tl.max(scores, 1) * scale)
            safe = m_new
            p = tl.exp2(scores * scale - safe[:, None])
        alpha = tl.exp2(m_i - safe)
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
        return acc, l_i, m_new

    @triton.jit(do_not_specialize=["start", "S", "T"])
    def _flash_kernel(
        out, q, k_cache, v_cache, k_tiles, v_tiles, sinks, input_pos, start, S, T, window, scale, cap,
        stride_b, stride_h,
        H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, STRIDE: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ):  # fmt: skip
        """BLOCK_M queries of one head over all keys that any of them sees. Blocks with the most keys come first.

        k_tiles, v_tiles: descriptors of the caches, by which some warps load tiles while others compute, or None.
        """
        block = tl.num_programs(2) - 1 - tl.program_id(2)
        head = tl.program_id(0)
        b = tl.program_id(1)
        pos = start
        if input_pos is not None:
            pos = tl.load(input_pos + b).to(tl.int32)
        s = block * BLOCK_M + tl.arange(0, BLOCK_M)
        d = tl.arange(0, DP)
        n = tl.arange(0, BLOCK_N)
        rows = ((b * S + s).to(tl.int64) * H + head)[:, None] * D + d[None, :]
        inside = (s < S)[:, None] & (d < D)[None, :]
        q = tl.load(q + rows, mask=inside, other=0.0)
        at = (pos + s)[:, None]
        first = tl.where(window > 0, tl.maximum(pos + block * BLOCK_M - window + 1, 0), 0)
        begin = first // BLOCK_N * BLOCK_N
        end = tl.minimum(pos + tl.minimum(block * BLOCK_M + BLOCK_M, S), T)
        whole = tl.where(window > 0, begin, tl.minimum(pos + block * BLOCK_M + 1, T) // BLOCK_N * BLOCK_N)
        base = b.to(tl.int64) * stride_b + (head // G).to(tl.int64) * stride_h
        k_at = k_cache + base + begin.to(tl.int64) * STRIDE + n[None, :] * STRIDE + d[:, None]  # (D, N)
        v_at = v_cache + base + begin.to(tl.int64) * STRIDE + n[:, None] * STRIDE + d[None, :]  # (N, D)
        m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        l_i = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, DP), tl.float32)
        for t0 in tl.range(begin, whole, BLOCK_N, warp_specialize=k_tiles is not None):  # keys that every query sees
            if k_tiles is not None:
                k = k_tiles.load([b, head // G, t0, 0]).reshape(BLOCK_N, DP).trans()
                v = v_tiles.load([b, head // G, t0, 0]).reshape(BLOCK_N, DP)
            elif D == DP:
                k = tl.load(k_at)
                v = tl.load(v_at)
            else:
                k = tl.load(k_at, mask=(d < D)[:, None], other=0.0)
                v = tl.load(v_at, mask=(d < D)[None, :], other=0.0)
            acc, l_i, m_i = _step(q, k, v, acc, l_i, m_i, None, scale, cap, False)
            if k_tiles is None:
                k_at += BLOCK_N * STRIDE
                v_at += BLOCK_N * STRIDE
        if k_tiles is not None:
            k_at += (whole - begin).to(tl.int64) * STRIDE
            v_at += (whole - begin).to(tl.int64) * STRIDE
        for t0 in range(whole, end, BLOCK_N):
            t = t0 + n[None, :]
            inner = (t0 + n >= first) & (t0 + n < end)
            k = tl.load(k_at, mask=(d < D)[:, None] & inner[None, :], other=0)
            v = tl.load(v_at, mask=(d < D)[None, :] & inner[:, None], other=0)
            seen = (t <= at) & inner[None, :] & ((window <= 0) | (t > at - window))
            acc, l_i, m_i = _step(q, k, v, acc, l_i, m_i, seen, scale, cap, True)
            k_at += BLOCK_N * STRIDE
            v_at += BLOCK_N * STRIDE
        if sinks is not None:
            l_i = softmax.with_sink(l_i, m_i, softmax.sinks_of(sinks, head, True))
        tl.store(out + rows, (acc / l_i[:, None]).to(out.dtype.element_ty), mask=inside)


def _specializes(device: torch.device) -> bool:
    """Whether warps that load beside others that compute are faster: measured on a Hopper alone."""
    return common.gpu(device).capability[0] == 9


def supports(k_cache: Tensor) -> bool:
    """Whether the kernels serve heads of this size, for any number of new tokens."""
    return k_cache.shape[3] <= max(BLOCKS)


@op("attention_prefill", mutates=("k_cache", "v_cache", "k_scales", "v_scales"))
def attention_prefill(
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
) -> Tensor:
    """As `attention`, for any S. input_pos may lie on the host, where positions are known and alike in all rows."""
    B, S, _ = qkv.shape
    _, Hkv, T, D = k_cache.shape
    start = int(input_pos[0]) if input_pos.device != qkv.device else None
    positions = (input_pos, 0) if start is None else (None, start)
    DP = max(16, triton.next_power_of_2(D))
    kind, scales = kv_cache.kind_of(k_cache), k_cache if k_scales is None else k_scales
    strides = (*k_cache.stride()[:2], *scales.stride()[:2])
    shared = {"D": D, "DP": DP}
    q = torch.empty(B, S, n_head, D, dtype=qkv.dtype, device=qkv.device)
    _rotate_kernel[(triton.cdiv(S, TOKENS), n_head + 2 * Hkv, B)](
        q, k_cache, v_cache, k_scales, v_scales, qkv.contiguous(), *positions, rope, q_norm, k_norm, S, T,
        0 if rope is None else rope.shape[0] - 1, eps, *strides, H=n_head, HKV=Hkv,
        ROTARY=0 if rope is None else 2 * rope.shape[1], STRIDE=k_cache.stride(2), KIND=kind, TOKENS=TOKENS,
        num_warps=4, **shared,
    )  # fmt: skip
    if k_scales is not None:  # once, where each block of queries would do it for itself, which measured half as fast
        bytes = ((k_cache, k_scales), (v_cache, v_scales))
        k_cache, v_cache = (torch.empty(B, Hkv, T, D, dtype=q.dtype, device=q.device) for _ in range(2))
        for out, (cache, scales) in zip((k_cache, v_cache), bytes):
            _widen_cache_kernel[(triton.cdiv(T, WIDENED), Hkv, B)](
                out, cache, scales, *positions, S, T, window, *strides, HKV=Hkv, STRIDE=cache.stride(2), KIND=kind,
                TOKENS=WIDENED, num_warps=4, **shared,
            )  # fmt: skip
    if not (window or soft_cap) and sinks is None and prefill_cudnn.supports(q, k_cache, start):
        return prefill_cudnn.attention(q, k_cache, v_cache, start, scale).reshape(B, S, n_head * D)
    out = torch.empty_like(q)
    block_m, block_n, stages = next(blocks for most, blocks in BLOCKS.items() if most >= D)
    tiles = [None, None]
    if _specializes(q.device) and D == DP and D <= 128 and start is not None:
        tiles = [TensorDescriptor(c, c.shape, c.stride(), [1, 1, block_n, D]) for c in (k_cache, v_cache)]
    _flash_kernel[(n_head, B, triton.cdiv(S, block_m))](
        out, q, k_cache, v_cache, *tiles, sinks, *positions, S, T, window,
        *softmax.constants(D**-0.5 if scale is None else scale, soft_cap), *k_cache.stride()[:2], H=n_head,
        G=n_head // Hkv, STRIDE=k_cache.stride(2), BLOCK_M=block_m, BLOCK_N=block_n, num_warps=8, num_stages=stages,
        **shared,
    )  # fmt: skip
    return out.view(B, S, n_head * D)
