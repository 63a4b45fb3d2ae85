"""Keys and values in 8 bits, int8 or fp8 (e4m3), with a scale for each head and token.

    allocate(shape, dtype, kind, device)                 a layer's cache: (k, v), in 8 bits (k, v, k_scales, v_scales)
    quantize(x, dtype), dequantize(q, scales, dtype)     plain PyTorch, the reference
    encode(x, KIND)                                      the same in kernels
    widening(kind, dtype, hopper)                        how the decode kernel widens

int8 is stored as q + 128 in uint8: bytes that widen without a sign. Scales are bf16, which has fp32's range in half its
bytes. Values are divided by the scale as it is stored, rounded up so that the largest one fits: that costs up to 0.8 %
of the grid, and no further error.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ops.common import tl, triton

DTYPES = {"int8": torch.uint8, "fp8": torch.float8_e4m3fn}
LARGEST = {torch.uint8: 127.0, torch.float8_e4m3fn: 448.0}
SMALLEST = 2.0**-100  # of the largest value of a token, below which all are 0
PAD = 16  # scales of a head are allocated in so many: kernels read several at once


def allocate(shape: tuple[int, int, int, int], dtype: torch.dtype, kind: str | None, device) -> tuple[Tensor, ...]:
    """Zeros (B, Hkv, T, D) for keys and for values, in `dtype` or as kind says, and then scales bf16 (B, Hkv, T), T
    rounded up to PAD."""
    B, Hkv, T, _ = shape
    new = [torch.zeros(shape, dtype=DTYPES.get(kind, dtype), device=device) for _ in range(2)]
    if kind is not None:
        padded = (B, Hkv, -(-T // PAD) * PAD)
        new += [torch.zeros(padded, dtype=torch.bfloat16, device=device) for _ in range(2)]
    return tuple(new)


def kind_of(cache: Tensor) -> str:
    """What kernels call a cache's dtype."""
    return {dtype: kind for kind, dtype in DTYPES.items()}.get(cache.dtype, "16-bit")


def supports(cache: Tensor) -> bool:
    """Whether kernels on an NVIDIA GPU serve it: 16 bytes of a token at a time, and fp8 where the GPU knows it."""
    fp8 = cache.dtype is torch.float8_e4m3fn and cache.is_cuda
    if fp8 and torch.cuda.get_device_capability(cache.device) < (8, 9):
        return False
    return cache.shape[3] * cache.element_size() % 16 == 0


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values (..., D) as 8 bits, and their scales bf16 (...)."""
    x = x.float()
    scales = x.abs().amax(-1).clamp(min=SMALLEST) / LARGEST[dtype]
    scales = ((scales.view(torch.int32) + 0xFFFF) >> 16 << 16).view(torch.float32)
    x = x / scales[..., None]
    return (x.round() + 128 if dtype is torch.uint8 else x).to(dtype), scales.bfloat16()


def dequantize(q: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The values in `dtype`; without scales, q are values already."""
    if scales is None:
        return q.to(dtype)
    values = q.float() - 128 if q.dtype is torch.uint8 else q.float()
    return (values * scales[..., None].float()).to(dtype)


class Widening(NamedTuple):
    """How the decode kernel widens: to (value + bias) unit. Without assembly plain Triton does it, to values.

    keys: PTX that turns two words into their values, two of a register, in order; values: the same with two words of a
    token and two of the next, whose values of a feature become a register.
    """

    keys: str | None = None
    values: str | None = None
    bias: float = 0.0
    unit: float = 1.0
    lift: float = 1.0  # factor on weights, and on queries if the unit is not 1, against underflow


def widening(kind: str, dtype: torch.dtype, hopper: bool) -> Widening:
    """Of a kind of cache, for queries of `dtype`. fp8 becomes fp16, by one instruction for two values. A byte becomes
    the low bits of a 16-bit float: in bf16 so many times 2^-133, subnormal, which tensor cores take; under 0x64 in fp16
    1024 more. So `bias` is taken off their sums, instead of each."""
    if kind == "16-bit":
        values = "prmt.b32 $0, $4, $6, 0x5410; prmt.b32 $1, $4, $6, 0x7632;"
        values += "prmt.b32 $2, $5, $7, 0x5410; prmt.b32 $3, $5, $7, 0x7632;"
        return Widening("mov.b32 $0, $2; mov.b32 $1, $3;", values) if hopper else Widening()
    half = kind == "fp8" or dtype == torch.float16
    if not hopper:
        return Widening(lift=64.0 if half else 1.0)

    def widened(word: str, first: int) -> str:
        if kind == "fp8":
            convert = "cvt.rn.f16x2.e4m3x2"
            return f"mov.b32 {{l, h}}, {word}; {convert} ${first}, l; {convert} ${first + 1}, h;"
        high = "0x64646464" if half else "0"
        return f"prmt.b32 ${first}, {word}, {high}, 0x4140; prmt.b32 ${first + 1}, {word}, {high}, 0x4342;"

    keys = [widened(f"${4 + i}", 2 * i) for i in range(2)]
    values = [
        f"prmt.b32 t, ${8 + i}, ${10 + i}, {pick}; {widened('t', 4 * i + 2 * part)}"
        for i in range(2)
        for part, pick in enumerate(("0x5140", "0x7362"))
    ]
    keys, values = (f"{{ .reg .b32 t; .reg .b16 l, h; {' '.join(lines)} }}" for lines in (keys, values))
    if half:
        return Widening(keys, values, 0.0 if kind == "fp8" else 1152.0, 1.0, 64.0)
    return Widening(keys, values, 128.0, 2.0**-133, 2.0**80)


if triton is None:
    encode = None
else:

    @triton.jit
    def encode(x, KIND: tl.constexpr):
        """Values fp32 (R, DP) as 8 bits, their scales fp32 (R,), and what is stored so, fp32 (R, DP)."""
        LARGEST: tl.constexpr = 127.0 if KIND == "int8" else 448.0
        scale = tl.maximum(tl.max(tl.abs(x), 1), 7.888609052210118e-31) / LARGEST
        scale = ((scale.to(tl.int32, bitcast=True) + 0xFFFF) >> 16 << 16).to(tl.float32, bitcast=True)
        x = x / scale[:, None]
        if KIND == "int8":
            x = (x + 12582912.0) - 12582912.0  # to the nearest integer, ties to even
            q = (x.to(tl.int32) + 128).to(tl.uint8)
        else:
            # To 3 bits behind the leading one, or to a multiple of 2^-9, ties to even, and put together: ptxas 12.8
            # takes a wrong register where values become e4m3, are stored in fours and widened again, and Triton's
            # interpreter loses a carry.
            bits = x.to(tl.int32, bitcast=True)
            of_two = tl.maximum((bits & 0x7F800000).to(tl.float32, bitcast=True), 0.015625)
            x = (x + of_two * 1572864.0) - of_two * 1572864.0
            normal = ((x.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >> 20) - 960  # the exponent's bias: 7 instead of 127
            code = tl.where(tl.abs(x) < 0.015625, (tl.abs(x) * 512.0).to(tl.int32), normal) | ((bits >> 24) & 128)
            code = tl.where(x == x, code, 127)
            q = code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
        return q, scale, x * scale[:, None]
