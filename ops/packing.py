"""Weights as the kernels want them, and the matrices that weights of any kind stand for."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])  # by its bits


def nibbles(packed: Tensor) -> Tensor:
    """uint8 (..., N, K/2), low nibble first -> uint8 (..., N, K)."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def group_size(K: int, count: int) -> int:
    """How many of K columns share a scale, where there are `count` groups of a power of two, the last one smaller."""
    return max(16, 1 << (-(-K // count) - 1).bit_length())


def dequantize(weight: Tensor, scales: Tensor | None, zeros: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight (N, K), or (E, N, K), that a stored or packed one stands for. int4: w = (q - 8) * scale + zero, as in
    tinygemm; mxfp4: w = q * 2^(scale - 127), see linear.py."""
    if weight.ndim == 5 and weight.dtype in (torch.int8, torch.uint8):  # experts packed for a CPU
        rest = ([None] * len(weight) if t is None else t for t in (scales, zeros))
        return torch.stack([dequantize(*own, dtype) for own in zip(weight, *rest)])
    if weight.dtype == torch.float4_e2m1fn_x2:
        weight, scales = unpack_mxfp4(weight, scales)
    if weight.dtype == torch.int32:
        weight, scales, zeros = unpack_int4(weight, scales)
    elif weight.ndim == 4:
        weight, scales, zeros = unpack_rows(weight, scales, zeros)
    if scales is not None and scales.dtype is torch.uint8:
        values = E2M1.to(weight.device)[nibbles(weight).int()].unflatten(-1, (-1, 32))
        powers = (scales.int() << 23).clamp(min=1 << 22).view(torch.float32)  # 2^(e - 127), by its bits
        return (values * powers[..., None]).to(dtype).flatten(-2)
    if weight.dtype == torch.uint8:
        offsets = nibbles(weight).to(dtype).unflatten(-1, (scales.shape[-1], -1)) - 8
        wide = torch.addcmul(zeros[..., None], offsets, scales[..., None])  # one rounding, not two
        return wide.to(dtype).flatten(-2)
    if scales is None or scales.ndim < weight.ndim:
        return weight.to(dtype) if scales is None else (weight.to(dtype) * scales[..., None]).to(dtype)
    if scales.ndim > weight.ndim:  # as `pack_grouped` has them
        scales, zeros = scales.unbind(-1)
    K, own = weight.shape[1], [t for t in (scales, zeros) if t is not None]
    scale, *zero = (t.repeat_interleave(group_size(K, t.shape[1]), 1)[:, :K] for t in own)
    return (torch.addcmul(zero[0], weight.to(dtype), scale) if zero else weight.to(dtype) * scale).to(dtype)


def pairs_of(scales: Tensor, zeros: Tensor) -> Tensor:
    """(scale, zero) pairs (..., 2) of 16 bits: bf16 as they are; others in fp16, to which a zero in fp32 is rounded,
    unless scales are out of its range."""
    pairs = torch.stack((scales.float(), zeros.float()), dim=-1)
    half = pairs.half()
    if scales.dtype is zeros.dtype is torch.bfloat16 or not half.isfinite().all():
        return pairs.bfloat16()
    worse = (half[..., 0].float() - scales).abs() > scales.abs() * 2**-8  # by what fp16 cannot hold, of small ones
    return pairs.bfloat16() if worse.any() else half


def in_16_bits(scales: Tensor, zeros: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The scales and zeros of groups, alike in bf16 or fp16 as `pairs_of` says."""
    if scales.itemsize == 2 and (zeros is None or zeros.dtype is scales.dtype):
        return scales, zeros
    scales, own = pairs_of(scales, torch.zeros_like(scales) if zeros is None else zeros).unbind(-1)
    return scales.contiguous(), None if zeros is None else own.contiguous()


def pack_grouped(scales: Tensor, zeros: Tensor | None) -> Tensor:
    """The scales (N, n) of grouped 8-bit weights, or with zeros pairs of both (N, n, 2), as the kernels read them."""
    return scales.contiguous() if zeros is None else pairs_of(scales, zeros)


def pack_int4(weight: Tensor, scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
    """Lay portable int4 (uint8 (N, K/2); scales, zeros (N, K/G)) out for the kernels; N must divide by 8.

    Returns words int32 (N/8, K'/128, 8, 4, 4), K' being K padded to a multiple of max(128, G), and
    (scale, zero) pairs in bf16 or fp16 (N/8, K''/256, 8, 256/G, 2), K'' being K padded to a multiple of 256.
    Word [n8, b, i, j, c] holds q[8 n8 + i, 128 b + 32 c + 8 j + 2 a + e] in nibble a + 4 e: 16 bytes of a lane are 8
    weights of each of 4 groups of 32, and one `lop3` turns nibbles a and a + 4 into two adjacent bf16 of a fragment.
    """
    N, group = weight.shape[0], 2 * weight.shape[1] // scales.shape[1]
    if N % 8 or group not in (32, 64, 128, 256):
        raise ValueError(
            f"int4 kernels support rows by 8 and groups of 32, 64, 128 or 256; got {N} rows, groups of {group}"
        )
    q = F.pad(nibbles(weight), (0, -2 * weight.shape[1] % max(128, group)), value=8)
    pairs = F.pad(pairs_of(scales, zeros), (0, 0, 0, -scales.shape[1] % (256 // group)))  # the scale in the low half
    return _words(q), pairs.view(N // 8, 8, -1, 256 // group, 2).transpose(1, 2).contiguous()


def _words(q: Tensor) -> Tensor:
    """q uint8 (N, K') -> the words of pack_int4."""
    q = q.view(len(q) // 8, 8, -1, 4, 4, 4, 2).permute(0, 2, 1, 4, 3, 6, 5).flatten(-2).int()  # n8 b i j c (e a)
    return (q << torch.arange(0, 32, 4, device=q.device, dtype=torch.int32)).sum(-1, dtype=torch.int32)


def _unwords(words: Tensor) -> Tensor:
    q = words[..., None] >> torch.arange(0, 32, 4, device=words.device) & 15  # n8 b i j c (e a)
    return q.unflatten(-1, (2, 4)).permute(0, 2, 1, 4, 3, 6, 5).flatten(2).flatten(0, 1).to(torch.uint8)  # N, K'


def unpack_int4(words: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of pack_int4, but for K, which stays padded (with q = 8, scale = zero = 0)."""
    q = _unwords(words)
    pairs = pairs.transpose(1, 2).flatten(2, 3).flatten(0, 1)[:, : q.shape[1] * pairs.shape[3] // 256]  # N, K'/G, 2
    scales, zeros = pairs.unbind(-1)
    return q[:, ::2] | q[:, 1::2] << 4, scales.contiguous(), zeros.contiguous()


def pack_mxfp4(weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Lay portable mxfp4 (uint8 (N, K/2); scales uint8 (N, K/32)) out for the kernels; N must divide by 8.

    Returns the words of pack_int4 as float4_e2m1fn_x2 (N/8, K'/128, 8, 4, 16), K' being K padded to a multiple of 128,
    and scales uint8 (N/8, K'/128, 8, 4).
    """
    if len(weight) % 8:
        raise ValueError(f"mxfp4 kernels support rows by 8; got {len(weight)}")
    q = F.pad(nibbles(weight), (0, -2 * weight.shape[1] % 128))
    scales = F.pad(scales, (0, -scales.shape[1] % 4)).view(len(weight) // 8, 8, -1, 4).transpose(1, 2).contiguous()
    return _words(q).view(torch.float4_e2m1fn_x2), scales


def unpack_mxfp4(words: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of pack_mxfp4, but for K, which stays padded, with zeros."""
    q = _unwords(words.view(torch.int32))
    return q[:, ::2] | q[:, 1::2] << 4, scales.transpose(1, 2).flatten(2).flatten(0, 1)


def pack_4_bits(weight: Tensor, scales: Tensor, zeros: Tensor | None) -> tuple[Tensor, Tensor]:
    """pack_int4, or pack_mxfp4 where there are no zeros."""
    return pack_mxfp4(weight, scales) if zeros is None else pack_int4(weight, scales, zeros)


def pack_rows(weight: Tensor, scales: Tensor, zeros: Tensor | None, lanes: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Lay portable int8 (N, K), of rows or groups, or int4 (N, K'/2) out for a CPU whose vectors hold `lanes` words:
    rows are padded to 16 of them, columns to 32, and four neighbouring values of each of `lanes` rows lie together.

    int8: (tiles, K'/4, lanes, 4); scales of rows become fp32 (N,). int4: uint8 (tiles, K'/8, lanes, 4), of each 32
    values first those from 0, 4, 8, 12 on in the low nibbles, and those from 16, 20, 24, 28 on in the high ones. Scales
    and zeros of groups: (tiles, K'/G, lanes), G being what divides K' as well.
    """
    more = -len(weight) % 16
    if weight.dtype is torch.int8:
        K, words = weight.shape[1], F.pad(weight, (0, -weight.shape[1] % 32, 0, more))
    else:
        low, high = nibbles(F.pad(weight, (0, 0, 0, more))).unflatten(1, (-1, 2, 16)).unbind(2)
        K, words = 0, (low | high << 4).flatten(1)
    words, width = words.unflatten(0, (-1, lanes)).unflatten(2, (-1, 4)).transpose(1, 2).contiguous(), words.shape[1]
    if scales.ndim == 1:
        return words, scales.float(), None
    if K:
        group = group_size(K, scales.shape[1])
        own = math.gcd(group, width)
        at = (torch.arange(width // own) * own // group).clamp(max=scales.shape[1] - 1)
        scales, zeros = scales[:, at], None if zeros is None else zeros[:, at]

    def by_lanes(t: Tensor) -> Tensor:
        return F.pad(t, (0, 0, 0, more)).unflatten(0, (-1, lanes)).transpose(1, 2).contiguous()

    return words, by_lanes(scales), None if zeros is None else by_lanes(zeros)


def unpack_rows(weight: Tensor, scales: Tensor, zeros: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inverse of pack_rows, but for rows and columns of padding, and scales of rows, which are padded as well."""
    weight = weight.transpose(1, 2).flatten(2).flatten(0, 1)
    if scales.ndim == 1:
        return weight, F.pad(scales, (0, len(weight) - len(scales))), None
    scales, zeros = (None if t is None else t.transpose(1, 2).flatten(0, 1) for t in (scales, zeros))
    if weight.dtype is torch.int8:
        return weight, scales, zeros
    q = torch.stack((weight & 15, weight >> 4), 1).unflatten(2, (-1, 16)).transpose(1, 2).flatten(1)
    return q[:, ::2] | q[:, 1::2] << 4, scales, zeros
