"""GGUF's block types as integers with scales, which linear.py's layouts hold; other types become floating point.

A reader takes blocks uint8 (N, n, bytes) and gives q (N, n, values), of 4 bits in -8..7, and scales and zeros, or None,
(N, n, groups) in fp32: w = q * scale [+ zero]. In K types scales are products of two, with more bits than fp16 has:
they and the zeros of all types are rounded to it, by 2^-12 of them, where bf16 weights would be rounded by 2^-9.

Specification: ggml's ggml-common.h and ggml-quants.c, https://github.com/ggml-org/ggml.
"""

import torch
from torch import Tensor

from formats.fp4 import TWICE, power
from formats.quantised import Quantised, layout_of, tensors_of


def _half(blocks: Tensor, at: int) -> Tensor:
    """The fp16 at a byte of each block, as fp32 (N, n, 1)."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(b: Tensor, run: int) -> Tensor:
    """The low nibbles of each run of bytes, then its high ones: (N, n, B) -> (N, n, 2 B)."""
    b = b.unflatten(-1, (-1, run))
    return torch.stack((b & 15, b >> 4), -2).flatten(2)


def _bits(b: Tensor) -> Tensor:
    """Bits of bytes, the low one first: (N, n, B) -> (N, n, 8 B)."""
    return (b[..., None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(2)


def _fields(b: Tensor, bits: int) -> Tensor:
    """Fields of each run of 32 bytes, the lowest of all its bytes first: (N, n, B) -> (N, n, 8 B / bits)."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None]
    return (b.unflatten(2, (-1, 1, 32)) >> shifts & (1 << bits) - 1).flatten(2)


def _q4_0(b):
    return _nibbles(b[..., 2:], 16).to(torch.int8) - 8, _half(b, 0), None


def _q4_1(b):
    scale, low = _half(b, 0), _half(b, 2)
    return _nibbles(b[..., 4:], 16).to(torch.int8) - 8, scale, low + 8 * scale


def _q5_0(b):
    return (_nibbles(b[..., 6:], 16) | _bits(b[..., 2:6]) << 4).to(torch.int8) - 16, _half(b, 0), None


def _q5_1(b):
    return (_nibbles(b[..., 8:], 16) | _bits(b[..., 4:8]) << 4).to(torch.int8), _half(b, 0), _half(b, 2)


def _q8_0(b):
    return b[..., 2:].contiguous().view(torch.int8), _half(b, 0), None


def _six_bits(b: Tensor) -> tuple[Tensor, Tensor]:
    """Q4_K's and Q5_K's 8 scales and 8 minimums of 6 bits: 4 of each in 6 bits of a byte, whose upper two belong to the
    others, and these ones' lower four."""
    first, second, low = b[..., 4:8], b[..., 8:12], b[..., 12:16]
    scales = torch.cat((first & 63, low & 15 | first >> 6 << 4), -1)
    return scales.float(), torch.cat((second & 63, low >> 4 | second >> 6 << 4), -1).float()


def _q2_k(b):
    scales = b[..., :16]
    return _fields(b[..., 16:80], 2).to(torch.int8), _half(b, 80) * (scales & 15), -_half(b, 82) * (scales >> 4)


def _q3_k(b):
    low, high = _nibbles(b[..., 96:104], 8), b[..., 104:108]  # of 16 scales of 6 bits
    high = (high[..., None, :] >> torch.arange(0, 8, 2, dtype=torch.uint8)[:, None] & 3).flatten(2)
    q = _fields(b[..., 32:96], 2) | _fields(b[..., :32], 1) << 2
    return q.to(torch.int8) - 4, _half(b, 108) * ((low | high << 4).float() - 32), None


def _q4_k(b):
    scales, lows = _six_bits(b)
    scales, lows = _half(b, 0) * scales, _half(b, 2) * lows
    return _nibbles(b[..., 16:], 32).to(torch.int8) - 8, scales, 8 * scales - lows


def _q5_k(b):
    scales, lows = _six_bits(b)
    q = _nibbles(b[..., 48:], 32) | _fields(b[..., 16:48], 1) << 4
    return q.to(torch.int8), _half(b, 0) * scales, -_half(b, 2) * lows


def _q6_k(b):
    low = _nibbles(b[..., :128], 64)
    high = b[..., 128:192].unflatten(2, (2, 1, 32)) >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None] & 3
    scales = b[..., 192:208].contiguous().view(torch.int8).float()
    return (low | high.flatten(2) << 4).to(torch.int8) - 32, _half(b, 208) * scales, None


def _iq4(b: Tensor) -> Tensor:
    """The values of IQ4's 16 levels."""
    table = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
    return torch.tensor(table, dtype=torch.int8)[_nibbles(b, 16).int()]


def _iq4_nl(b):
    return _iq4(b[..., 2:]), _half(b, 0), None


def _iq4_xs(b):
    high = (b[..., 2:4, None] >> torch.arange(0, 8, 2, dtype=torch.uint8) & 3).flatten(2)  # of 8 scales of 6 bits
    low = torch.stack((b[..., 4:8] & 15, b[..., 4:8] >> 4), -1).flatten(2)
    return _iq4(b[..., 8:]), _half(b, 0) * ((low | high << 4).float() - 32), None


def _mxfp4(b):
    return TWICE[_nibbles(b[..., 1:], 16).int()], power(b[..., :1]) / 2, None


BLOCKS = {  # bits, group, zeros, reader
    "Q4_0": ("int4", 32, False, _q4_0),
    "Q4_1": ("int4", 32, True, _q4_1),
    "Q5_0": ("int8", 32, False, _q5_0),
    "Q5_1": ("int8", 32, True, _q5_1),
    "Q8_0": ("int8", 32, False, _q8_0),
    "Q2_K": ("int8", 16, True, _q2_k),
    "Q3_K": ("int8", 16, False, _q3_k),
    "Q4_K": ("int4", 32, True, _q4_k),
    "Q5_K": ("int8", 32, True, _q5_k),
    "Q6_K": ("int8", 16, False, _q6_k),
    "IQ4_NL": ("int8", 32, False, _iq4_nl),
    "IQ4_XS": ("int8", 32, False, _iq4_xs),
    "MXFP4": ("int8", 32, False, _mxfp4),
}


def quantised(kind: str, rows: Tensor, shape: tuple[int, int]) -> Quantised | None:
    """The weight (N, K) whose rows are uint8 (N, bytes) of a type, if a layout holds it."""
    if kind not in BLOCKS or len(shape) != 2:
        return None
    bits, group, zeros, reader = BLOCKS[kind]
    dtype = torch.bfloat16 if kind == "MXFP4" else torch.float16  # powers of two, of bf16's range
    layout = layout_of(bits, group, shape[1], dtype, dtype if zeros else None)
    if layout is None:
        return None

    def read() -> dict[str, Tensor]:
        n = shape[1] // (256 if kind.endswith(("_K", "_XS")) else 32)
        pieces = [reader(part.unflatten(1, (n, -1))) for part in rows.split(4096)]  # wide copies of some rows only
        q, scales, zeros = (
            torch.cat([p.flatten(1) for p in own]) if own[0] is not None else None for own in zip(*pieces)
        )
        return tensors_of(layout, q, scales, zeros, group)

    return Quantised(layout, read)
