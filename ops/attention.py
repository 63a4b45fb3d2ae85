"""Causal attention of new tokens over a static cache, RoPE and cache write included.

    attention(layer, qkv, cache, input_pos, rope)   by the first backend that supports it
    prepare(layer, first_layer, soon, later)        what only the Triton kernel wants to know

Backends: attention_triton.py's kernel for 1 to 16 new tokens a row on an NVIDIA GPU, prefill.py's for more, the CPU's
own for up to 64, plain PyTorch.
Axes: B rows, S new tokens, T cache length, H query heads, Hkv key/value heads, G = H / Hkv, D head dim, R of it rotate.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops import cpu, kv_cache, prefill
from ops.attention_triton import attention_triton, prefetch_lines
from ops.common import MAX_ROWS, on_triton, op
from ops.linear import half_is_slow
from ops.linear_triton import configuration
from ops.rms_norm import rms_norm
from ops.rotary import rotate

SCORES = 2**24  # that the plain way of a soft cap or sinks holds at a time


class AttentionLayer(Protocol):
    """What `attention` reads of a layer."""

    n_head: int
    window: int  # position p sees keys j > p - window; 0: all before it
    scale: float  # of scores, as a rule D**-0.5
    soft_cap: float  # scores become cap tanh(scores / cap); 0: they stay
    sinks: Tensor | None  # (H,), a logit of each head in the softmax's denominator alone
    q_norm: nn.RMSNorm | None  # over each head, before RoPE
    k_norm: nn.RMSNorm | None
    first_layer: bool  # whether positions and caches may just have been written when this layer starts
    prefetch: Tensor | None  # weights that will be read, whose first part a GPU brings to its L2 cache meanwhile
    prefetch_lines: tuple[int, int]  # how many lines of 128 bytes, with one row and with several
    wo: nn.Module  # the linear layer that reads the result


def prepare(
    layer: AttentionLayer, first_layer: bool = True, soon: Tensor | None = None, later: Tensor | None = None
) -> None:
    """Tell a layer where it stands: whether it is the model's first, and what weights are read soon after it or, if
    those depend on its result, later."""
    layer.first_layer, layer.prefetch = first_layer, later if soon is None else soon
    lines, wo = prefetch_lines(soon, later), layer.wo
    alone = lines and on_triton(wo.weight) and configuration(wo.weight, wo.scales, wo.in_features, 1).no_prefetch
    layer.prefetch_lines = (0 if alone else lines, lines)


def attention(
    layer: AttentionLayer, qkv: Tensor, cache: tuple[Tensor, ...], input_pos: Tensor, rope: Tensor | None
) -> Tensor:
    """Causal attention of S new tokens a row, whose keys and values enter the cache: -> (B, S, H D).

    qkv (B, S, (H + 2 Hkv) D), heads of q, k, v in this order; cache: keys and values (B, Hkv, T, D), and in 8 bits
    their scales, see kv_cache.py; input_pos (B,), the position of each row's first new token, on the host where it
    knows them and they are alike; rope fp32 (positions, R/2, 2), see `rotate`, or None. Position p sees keys j <= p,
    and those of the layer's window. Nothing is written at T or beyond.
    """
    k_cache, v_cache, *scales = cache
    q_norm, k_norm, eps = None, None, 0.0
    if layer.q_norm is not None:
        q_norm, k_norm, eps = layer.q_norm.weight, layer.k_norm.weight, layer.q_norm.eps
    usual = (rope, q_norm, k_norm, eps, layer.n_head, layer.window)
    rest = (*usual, layer.scale, layer.soft_cap, layer.sinks, *scales)
    kernels = on_triton(qkv) and qkv.element_size() == 2 and kv_cache.supports(k_cache)
    if kernels and qkv.shape[1] <= MAX_ROWS:
        lines = layer.prefetch_lines[qkv.numel() > qkv.shape[2]]
        more = {"prefetch": layer.prefetch, "prefetch_lines": lines, "first_layer": layer.first_layer}
        return attention_triton(qkv, k_cache, v_cache, input_pos.to(qkv.device), *rest, **more)
    if kernels and prefill.supports(k_cache):
        return prefill.attention_prefill(qkv, k_cache, v_cache, input_pos, *rest)
    known = layer.scale == k_cache.shape[3] ** -0.5 and not layer.soft_cap and layer.sinks is None
    known = known and (q_norm is None or q_norm.dtype is qkv.dtype)
    if known and cpu.supports_attention(qkv, k_cache, v_cache, input_pos):
        return cpu.attention(qkv, k_cache, v_cache, input_pos, *usual, *scales)
    return attention_plain(qkv, k_cache, v_cache, input_pos.to(qkv.device), *rest)


@op("attention_plain", mutates=("k_cache", "v_cache", "k_scales", "v_scales"))
def attention_plain(
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
    """Plain PyTorch, the reference. An op, as it reads positions where that costs nothing."""
    B, S, _ = qkv.shape
    _, Hkv, T, D = k_cache.shape
    positions = input_pos[:, None] + torch.arange(S, device=qkv.device)  # (B, S)
    starts = input_pos.tolist() if qkv.is_cpu else None  # reading them costs nothing here
    q, k, v = _rotated(qkv, positions, rope, q_norm, k_norm, eps, n_head, Hkv)
    for cache, scales, new in ((k_cache, k_scales, k), (v_cache, v_scales, v)):
        if scales is not None:
            new, of_new = kv_cache.quantize(new, cache.dtype)
            _write_cache(scales[..., None], of_new[..., None], input_pos, starts)
        _write_cache(cache, new, input_pos, starts)
    live = min(max(starts) + S, T) if starts else T
    keys, values = (
        kv_cache.dequantize(cache[:, :, :live], scales if scales is None else scales[:, :, :live], q.dtype)
        for cache, scales in ((k_cache, k_scales), (v_cache, v_scales))
    )
    scale, usual = D**-0.5 if scale is None else scale, not soft_cap and sinks is None
    if starts and S > 1 and not window and usual and max(starts) + S <= T:
        rows = [_flash(q[b], keys[b], values[b], start, scale) for b, start in enumerate(starts)]
        return torch.stack(rows).flatten(2)
    if len(positions) == S == 1 and starts and not window:
        mask = None  # a token that sees all
    else:
        j = torch.arange(live, device=qkv.device)
        mask = j <= positions[..., None]  # (B, S, live)
        if window > 0:
            mask &= j > positions[..., None] - window
        mask = mask[:, None, :, None].expand(-1, -1, -1, n_head // Hkv, -1).flatten(2, 3)  # (B, 1, S G, live)
    # Query heads that share a key become rows beside each other: PyTorch's own grouping, with a mask, is slow.
    q = q.unflatten(2, (Hkv, -1)).transpose(1, 2).flatten(2, 3)  # (B, Hkv, S G, D)
    if usual:
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale)
    else:
        out = _softmax(q, keys, values, mask, scale, soft_cap, sinks)
    return out.unflatten(2, (S, -1)).transpose(1, 2).reshape(B, S, n_head * D)


def _softmax(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, soft_cap: float, sinks: Tensor | None
) -> Tensor:
    """As PyTorch's scaled_dot_product_attention, of q (B, Hkv, S G, D), with a soft cap and sinks."""
    B, Hkv, rows, _ = q.shape
    dtype, out = torch.promote_types(q.dtype, torch.float32), torch.empty_like(q)
    keys, values = keys.to(dtype), values.to(dtype)
    size = max(1, SCORES // (B * Hkv * keys.shape[2]))
    for part in (slice(a, a + size) for a in range(0, rows, size)):
        scores = scale * (q[:, :, part].to(dtype) @ keys.mT)
        if soft_cap:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, :, part], -torch.inf)
        lse = scores.logsumexp(3, keepdim=True).clamp(min=-1e30)  # finite where a token past the cache sees nothing
        if sinks is not None:
            per_row = sinks.to(dtype).view(Hkv, 1, -1).expand(-1, rows * Hkv // len(sinks), -1).flatten(1)
            lse = torch.logaddexp(lse, per_row[None, :, part, None])
        out[:, :, part] = (torch.exp(scores - lse) @ values).to(q.dtype)
    return out


def _rotated(qkv, positions, rope, q_norm, k_norm, eps, n_head, Hkv) -> tuple[Tensor, Tensor, Tensor]:
    """Norms and RoPE: queries (B, S, H, D), keys and values (B, S, Hkv, D)."""
    qk, v = qkv.unflatten(2, (n_head + 2 * Hkv, -1)).split((n_head + Hkv, Hkv), dim=2)  # (B, S, heads, D)
    if q_norm is not None:
        q, k = qk.split((n_head, Hkv), dim=2)
        qk = torch.cat((rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)), dim=2)
    if rope is not None:
        qk = rotate(qk, positions, rope)
    return *qk.split((n_head, Hkv), dim=2), v


def _flash(q: Tensor, keys: Tensor, values: Tensor, start: int, scale: float) -> Tensor:
    """One row's queries (S, H, D) at positions from `start` on, over its keys and values (Hkv, start + S, D), by
    PyTorch's flash attention for CPUs: what was there before without a mask, the new tokens among themselves as a
    causal square, merged by their log-sum-exps."""
    S, H, _ = q.shape
    dtype = torch.float32 if half_is_slow(q, q.dtype) else q.dtype
    queries = q.transpose(0, 1)[None].to(dtype)

    def attend(first: int, last: int, causal: bool) -> tuple[Tensor, Tensor]:
        k, v = (c[:, first:last].to(dtype).repeat_interleave(H // len(c), 0)[None] for c in (keys, values))
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, k, v, 0.0, causal, scale=scale
        )  # (1, H, S, D), lse

    out, lse = attend(start, start + S, True)
    if start:
        before, before_lse = attend(0, start, False)
        out = torch.lerp(before, out, torch.sigmoid(lse - before_lse)[..., None].to(dtype))
    return out[0].transpose(0, 1).to(q.dtype)


@torch.library.register_fake("gptfast::attention")
@torch.library.register_fake("gptfast::attention_plain")
@torch.library.register_fake("gptfast::attention_prefill")
def _attention_fake(qkv, k_cache, v_cache, input_pos, rope, q_norm, k_norm, eps, n_head, window, *rest, **more):
    return qkv.new_empty((*qkv.shape[:2], n_head * k_cache.shape[-1]))


def _write_cache(cache: Tensor, new: Tensor, input_pos: Tensor, starts: list[int] | None = None) -> None:
    """Put new (B, S, Hkv, D) at positions input_pos + s of the cache (B, Hkv, T, D); what lies beyond T is dropped.

    starts: input_pos, if the host knows it.
    """
    B, S, _, _ = new.shape
    T = cache.shape[2]
    if cache.dtype is torch.float8_e4m3fn:  # which not all that follows knows
        cache, new = cache.view(torch.uint8), new.view(torch.uint8)
    if starts is not None:
        for row, start in enumerate(starts):
            cache[row, :, start : start + S] = new[row, : max(T - start, 0)].transpose(0, 1)
        return
    new, S = new[:, :T], min(S, T)
    # The S slots from min(pos, T - S) on always exist; those before pos keep what they hold. No host sync is needed.
    slot = input_pos.clamp(max=T - S)[:, None] + torch.arange(S, device=new.device)  # (B, S)
    batch = torch.arange(B, device=new.device)[:, None]
    source = slot - input_pos[:, None]
    fresh = new[batch, source.clamp(min=0)].to(cache.dtype)
    cache[batch, :, slot] = torch.where((source >= 0)[..., None, None], fresh, cache[batch, :, slot])
