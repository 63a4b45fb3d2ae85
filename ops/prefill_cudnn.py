"""Attention of a whole chunk of a very long prompt by cuDNN, whose kernel is a fifth faster than ours on a Hopper.

    plan(layer, cache)                   have cuDNN plan what the chunks of a prompt as long as a cache need
    supports(q, k_cache, start)          whether a chunk is such a one, and planned
    attention(q, k_cache, v_cache, start, scale)

cuDNN plans each pair of lengths that it meets, for a tenth of a second, and loads itself for a second. So it gets few
pairs: a chunk's new tokens among themselves, and those over pieces of 1, 2, 4 or 8 chunks of what was there before,
merged by their log-sum-exps (Milakov and Gimelshein, arXiv:1805.02867).
Axes: B rows, S new tokens, H query heads, Hkv key/value heads, D head dim.
"""

import torch
from torch import Tensor

from ops.common import tl, triton

CHUNK = 8192  # tokens
PIECES = (8, 4, 2, 1)  # chunks
LONG = 4 * CHUNK  # a cache that holds so many tokens is worth planning for
ROWS = 16  # of a program that merges

_planned: set[tuple] = set()  # what `_key` makes of queries

if triton is not None:

    @triton.jit
    def _merge_kernel(
        out, lse, part, part_lse, S, stride_h, stride_s, part_h, part_s, lse_h, D: tl.constexpr, ROWS: tl.constexpr
    ):
        """out and lse (B H, S) of some keys become those of some more, whose are part and part_lse."""
        head = tl.program_id(1).to(tl.int64)
        s = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        d = tl.arange(0, D)
        inside = s < S
        ours = tl.load(lse + head * lse_h + s, inside, other=0.0)
        theirs = tl.load(part_lse + head * lse_h + s, inside, other=0.0)
        top = tl.maximum(ours, theirs)
        a, b = tl.exp(ours - top), tl.exp(theirs - top)
        at = out + head * stride_h + s.to(tl.int64)[:, None] * stride_s + d[None, :]
        of = part + head * part_h + s.to(tl.int64)[:, None] * part_s + d[None, :]
        x = tl.load(at, inside[:, None], other=0.0).to(tl.float32)
        y = tl.load(of, inside[:, None], other=0.0).to(tl.float32)
        merged = (x * (a / (a + b))[:, None]) + y * (b / (a + b))[:, None]
        tl.store(at, merged.to(out.dtype.element_ty), inside[:, None])
        tl.store(lse + head * lse_h + s, top + tl.log(a + b), inside)


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    """q (1, H, S, D), k and v (1, Hkv, T, D) -> (1, H, S, D) and the log-sum-exps fp32 (1, H, S, 1)."""
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)[:2]


def _key(q: Tensor, Hkv: int) -> tuple:
    return q.device, q.dtype, q.shape[2], Hkv, q.shape[3]


def plan(layer, k_cache: Tensor) -> None:
    """Let cuDNN plan for a layer's heads and a cache (B, Hkv, T, D), unless it is short or cuDNN does not serve it."""
    _, Hkv, T, D = k_cache.shape
    if not k_cache.is_cuda or torch.cuda.get_device_capability(k_cache.device)[0] != 9:
        return
    if T < LONG or D not in (64, 128) or k_cache.element_size() != 2 or layer.window or layer.soft_cap:
        return
    q = torch.zeros(1, CHUNK, layer.n_head, D, dtype=k_cache.dtype, device=k_cache.device)
    keys = torch.zeros(1, Hkv, PIECES[0] * CHUNK, D, dtype=q.dtype, device=q.device)
    _attend(q.transpose(1, 2), keys[:, :, :CHUNK], keys[:, :, :CHUNK], True, layer.scale)
    for size in (size * CHUNK for size in PIECES if (size + 1) * CHUNK <= T):
        _attend(q.transpose(1, 2), keys[:, :, :size], keys[:, :, :size], False, layer.scale)
    _planned.add(_key(q, Hkv))


def supports(q: Tensor, k_cache: Tensor, start: int | None) -> bool:
    """Whether queries (B, S, H, D) at positions from `start` on are a chunk that is planned."""
    whole = start is not None and len(q) == 1 and q.shape[1] == CHUNK and start % CHUNK == 0
    return whole and k_cache.shape[2] >= start + CHUNK and _key(q, k_cache.shape[1]) in _planned


def attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, start: int, scale: float | None) -> Tensor:
    """Causal attention of queries (1, S, H, D) at positions from `start` on over a cache that holds their keys and
    values (1, Hkv, T, D): (1, S, H, D)."""
    S, H, D = q.shape[1:]
    q = q.transpose(1, 2)
    out, lse = _attend(q, k_cache[:, :, start : start + S], v_cache[:, :, start : start + S], True, scale)
    begin = 0
    while begin < start:
        end = begin + next(size for size in PIECES if begin + size * S <= start) * S
        part, part_lse = _attend(q, k_cache[:, :, begin:end], v_cache[:, :, begin:end], False, scale)
        _merge_kernel[(triton.cdiv(S, ROWS), H)](
            out, lse, part, part_lse, S, out.stride(1), out.stride(2), part.stride(1), part.stride(2), lse.stride(1),
            D=D, ROWS=ROWS, num_warps=4,
        )  # fmt: skip
        begin = end
    return out.transpose(1, 2)
