"""Linear layers for every kind of weight, behind one signature: y = [residual +] W norm(x) [+ bias].

A few rows (decoding) on an NVIDIA GPU go to the fused kernels; all else is plain PyTorch. On disk, for every device:

    int8   weight int8 (N, K), scales bf16 (N,):           w = q * scale             (gpt-fast's file)
    fp8    weight float8_e4m3fn (N, K), scales bf16 (N,):  w = q * scale
    int4   weight uint8 (N, K'/2), low nibble first, scales and zeros bf16 (N, K'/G): w = (q - 8) * scale + zero,
           where K' is K padded up to a multiple of the group G
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import cpu
import gemv
from errors import UserError

GROUPS = (32, 64, 128, 256)
PIECE = 2**20  # weights widened to fp32 at a time


class Linear(nn.Module):
    """A linear layer with a bf16, fp16 or fp32 weight (N, K), and the base of the quantised ones.

    `norm` is an RMSNorm to apply to x first, `residual` a tensor to add to the result: a kernel does both on the way.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self.register_parameter("scales", None)
        self.register_parameter("zeros", None)
        self.widen = False  # whether to multiply in fp32, for a CPU without half-precision arithmetic
        self.on_cpu = False  # whether the CPU's kernels take this weight

    @classmethod
    def from_tensors(cls, in_features: int, out_features: int, tensors: dict[str, Tensor]) -> "Linear":
        """The layer that these tensors (weight; scales, zeros, bias where there are any) make up. Nothing is copied."""
        with torch.device("meta"):
            layer = cls(in_features, out_features)
        for name, tensor in tensors.items():
            setattr(layer, name, nn.Parameter(tensor, requires_grad=False))
        return layer

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight as the matrix (N, K) it stands for."""
        return gemv.dequantize(self.weight, self.scales, self.zeros, dtype)[:, : self.in_features]

    def matmul(self, x: Tensor) -> Tensor:
        """W x for x (..., K), in plain PyTorch."""
        if self.widen and x.numel() > 6 * x.shape[-1]:  # in pieces: fresh memory for all of an output layer is slow
            pieces = self.dequantized(x.dtype).split(max(1, PIECE // self.in_features))
            return torch.cat([F.linear(x.float(), piece.float()) for piece in pieces], -1).to(x.dtype)
        return F.linear(x, self.dequantized(x.dtype))

    def pack(self, dtype: torch.dtype = torch.bfloat16) -> None:
        """Lay the weight out for the device it is on and activations of `dtype`. Called once, after loading."""
        self.widen = _half_is_slow(self.weight.device, dtype)
        self.on_cpu = cpu.takes(self.weight, self.scales, self.bias, dtype)

    def forward(
        self, x: Tensor, norm=None, residual: Tensor | None = None, fp32: bool = False, gates: bool = False
    ) -> Tensor:
        """x (..., K) -> (..., N) in x's dtype, or fp32 if asked; with `gates`, if `interleaved`, (..., N / 2)."""
        gain, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        if gemv.takes(x, self.weight, gain):
            dtype = torch.float32 if fp32 else x.dtype
            return gemv.linear(x, self.weight, self.scales, self.bias, gain, eps, residual, dtype, gates)
        if self.on_cpu and x.numel() <= cpu.MAX_ROWS * x.shape[-1]:
            return cpu.linear(x, self.weight, self.scales, self.zeros, self.bias, gain, eps, residual, fp32, gates)
        y = self.matmul(x if norm is None else norm(x))
        if self.bias is not None:
            y = y + self.bias
        if gates:
            y = gemv.gated(y)
        if residual is not None:
            y = residual + y
        return y.float() if fp32 else y


def interleaved(gate: Linear, up: Linear) -> Linear | None:
    """One layer with the rows of both by turns of 8, for `gates`, if they are of one kind. Neither may be packed."""
    ours, theirs = dict(gate.named_parameters()), dict(up.named_parameters())
    kinds = [{name: (t.dtype, t.shape) for name, t in own.items()} for own in (ours, theirs)]
    if gate.out_features % 8 or kinds[0] != kinds[1]:
        return None
    turns = {k: torch.stack([t.unflatten(0, (-1, 8)) for t in (ours[k], theirs[k])], 1).flatten(0, 2) for k in ours}
    return type(gate).from_tensors(gate.in_features, 2 * gate.out_features, turns)


class Int8Linear(Linear):
    """Symmetric int8, one scale per output row."""

    @staticmethod
    def quantize(weight: Tensor) -> dict[str, Tensor]:
        """Round to nearest, the largest magnitude of a row being 127. (gpt-fast, whose format this is, makes it 127.5:
        that clips it, and doubles the perplexity that int8 costs SmolLM2.)"""
        weight = weight.float()
        scales = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).eps).bfloat16()
        q = (weight / scales.float()[:, None]).round().clamp(-128, 127)  # the scale may have been rounded down
        return {"weight": q.to(torch.int8), "scales": scales}


class FP8Linear(Linear):
    """8-bit floating point (e4m3, arXiv 2209.05433), one scale per output row."""

    @staticmethod
    def quantize(weight: Tensor) -> dict[str, Tensor]:
        """Round to nearest, the largest magnitude of a row being e4m3's largest, 448."""
        weight, top = weight.float(), torch.finfo(torch.float8_e4m3fn).max
        scales = (weight.abs().amax(1) / top).clamp(min=torch.finfo(torch.float32).eps).bfloat16()
        q = (weight / scales.float()[:, None]).clamp(-top, top)  # the scale may have been rounded down
        return {"weight": q.to(torch.float8_e4m3fn), "scales": scales}

    def pack(self, dtype: torch.dtype = torch.bfloat16) -> None:
        if self.weight.is_cpu:  # CPUs convert e4m3 more slowly than they would read the wider weight
            self.weight, self.scales = nn.Parameter(self.dequantized(dtype), requires_grad=False), None
        super().pack(dtype)


class Int4Linear(Linear):
    """Asymmetric int4 in groups of G = 32, 64, 128 or 256 along K (padded to K'): w = (q - 8) * scale + zero."""

    @staticmethod
    def grid(groups: Tensor) -> tuple[Tensor, Tensor]:
        """The scale and zero, rounded to bf16 and returned as fp32 (..., 1), that span weights (..., G) in 16 steps."""
        low, high = groups.aminmax(dim=-1, keepdim=True)
        scales = ((high - low) / 15).clamp(min=1e-6)
        return scales.bfloat16().float(), (low + 8 * scales).bfloat16().float()

    @staticmethod
    def round(groups: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """The nearest q in 0..15 on a grid, in groups' dtype."""
        return ((groups - zeros) / scales).round().add(8).clamp(0, 15)

    @staticmethod
    def quantize(weight: Tensor, group: int) -> dict[str, Tensor]:
        """Round to nearest."""
        weight = F.pad(weight.float()[None], (0, -weight.shape[1] % group), mode="replicate")[0]  # widens no range
        groups = weight.unflatten(1, (-1, group))
        scales, zeros = Int4Linear.grid(groups)
        return Int4Linear.tensors(Int4Linear.round(groups, scales, zeros).flatten(1), scales[..., 0], zeros[..., 0])

    @staticmethod
    def tensors(q: Tensor, scales: Tensor, zeros: Tensor) -> dict[str, Tensor]:
        """As on disk, from q (N, K') in 0..15 and scales and zeros (N, K'/G) that bf16 holds exactly."""
        q = q.to(torch.uint8)
        return {"weight": q[:, ::2] | q[:, 1::2] << 4, "scales": scales.bfloat16(), "zeros": zeros.bfloat16()}

    def pack(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().pack(dtype)
        if dtype.itemsize == 2 and self.weight.is_cuda and self.out_features % 8 == 0:
            weight, scales = gemv.pack_int4(self.weight, self.scales, self.zeros)
            self.weight = nn.Parameter(weight, requires_grad=False)
            self.scales, self.zeros = nn.Parameter(scales, requires_grad=False), None


def quantizer(mode: str) -> Callable[[Tensor], dict[str, Tensor]]:
    """What quantises a weight (N, K), a row at a time as far as the result goes, to "int8", "fp8", "int4" (in groups of
    32) or "int4:GROUP". Raises UserError for any other mode or group."""
    kind, _, group = mode.partition(":")
    if kind == "int4" and (group or "32") in map(str, GROUPS):
        return partial(Int4Linear.quantize, group=int(group or 32))
    if mode in ("int8", "fp8"):
        return Int8Linear.quantize if mode == "int8" else FP8Linear.quantize
    raise UserError(f"cannot quantise to {mode!r}; accepted: int8, fp8, int4, int4:32, int4:64, int4:128, int4:256")


def quantize_linear(mode: str, tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """A linear layer's tensors (weight (N, K) and perhaps bias) with the weight quantised; the bias stays as it is.

    Raises UserError for an unknown mode, and for a weight that is absent, quantised already or not finite.
    """
    weight = tensors.get("weight")
    if weight is None:
        raise UserError(f"{name} has no weight")
    if "scales" in tensors or weight.dtype.itemsize < 2:
        raise UserError(f"{name} is quantised already ({weight.dtype}); give the full-precision checkpoint")
    if not weight.isfinite().all():
        raise UserError(f"{name} holds NaN or infinite weights")
    return {**tensors, **quantizer(mode)(weight)}


def linear_from_tensors(in_features: int, out_features: int, tensors: dict[str, Tensor], name: str = "") -> Linear:
    """The layer of the kind that dtypes and shapes tell. Raises UserError where they tell of no (N, K) linear layer."""
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    N, K = out_features, in_features
    dtype = tensors["weight"].dtype if "weight" in tensors else None
    if shapes.pop("bias", (N,)) != (N,):
        dtype = None
    if dtype in (torch.float32, torch.float16, torch.bfloat16) and shapes == {"weight": (N, K)}:
        return Linear.from_tensors(K, N, tensors)
    if dtype in (torch.int8, torch.float8_e4m3fn) and shapes == {"weight": (N, K), "scales": (N,)}:
        return (Int8Linear if dtype is torch.int8 else FP8Linear).from_tensors(K, N, tensors)
    if dtype is torch.uint8 and any(
        shapes == {"weight": (N, n * G // 2), "scales": (N, n), "zeros": (N, n)} for G in GROUPS for n in (-(-K // G),)
    ):
        return Int4Linear.from_tensors(K, N, tensors)
    found = ", ".join(f"{key} {str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for key, t in tensors.items())
    raise UserError(
        f"{name or 'a linear layer'} needs a plain, int8, fp8 or int4 weight for {[N, K]}; found {found or 'none'}"
    )


def _half_is_slow(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether fp32 multiplies faster than `dtype`: half precision on an x86 CPU without AVX-512."""
    if device.type != "cpu" or dtype.itemsize != 2 or not torch.backends.mkldnn.is_available():
        return False
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
