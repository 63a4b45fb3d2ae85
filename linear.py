"""Linear layers for every kind of weight, split over ranks or not, and the kinds themselves. On disk, for every device:

    plain    weight bf16, fp16 or fp32 (N, K)
    int8     weight int8 (N, K), scales (N,):           w = q * scale             (gpt-fast's file)
    fp8      weight float8_e4m3fn (N, K), scales (N,):  w = q * scale
    grouped  weight int8 or float8_e4m3fn (N, K), scales and perhaps zeros (N, ceil(K/G)): w = q * scale [+ zero]
    int4     weight uint8 (N, K'/2), low nibble first, scales and zeros (N, K'/G): w = (q - 8) * scale + zero, where K'
             is K padded up to a multiple of the group G
    mxfp4    weight uint8 (N, K'/2), low nibble first, scales uint8 (N, K'/32): w = q * 2^(scale - 127), q being e2m1

Other scales and zeros are bf16 in files that quantize.py makes, and bf16, fp16 or fp32 in those that formats/ makes of
other programs' files. E experts, linear layers of one shape, have an axis E before N. How a layer is computed is ops'
business.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import ops
from errors import UserError, shown
from tp import TensorParallel, cut

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
GROUPS = (32, 64, 128, 256)
GROUPS8 = (16, *GROUPS)  # of 8-bit weights
CHUNK = 1 << 20  # weights quantised at a time: fp32 copies of a large output would not fit


class Plain:
    """A weight in floating point."""

    @staticmethod
    def matches(weight: Tensor, shapes: dict[str, tuple], rows: tuple[int, ...], K: int) -> bool:
        """Whether a weight makes up (*rows, K), rows being (N,) or (E, N)."""
        return weight.dtype in FLOATS and shapes == {"weight": (*rows, K)}

    @staticmethod
    def columns(tensors: dict[str, Tensor], part: range) -> dict[str, Tensor]:
        """The columns `part` of a weight, with zeros where they reach past its end."""
        return {**tensors, "weight": cut(tensors["weight"], 1, part)}


class Int8(Plain):
    """Symmetric int8, one scale per output row."""

    dtype, top = torch.int8, 127  # gpt-fast, whose format this is, makes a row's largest magnitude 127.5

    @classmethod
    def matches(cls, weight: Tensor, shapes: dict[str, tuple], rows: tuple[int, ...], K: int) -> bool:
        return weight.dtype is cls.dtype and shapes == {"weight": (*rows, K), "scales": rows}

    @classmethod
    def quantize(cls, weight: Tensor) -> dict[str, Tensor]:
        """Round to nearest, the largest magnitude of a row being the dtype's. (More clips it: 127.5 doubles the
        perplexity that int8 costs SmolLM2.)"""
        weight = weight.float()
        scales = (weight.abs().amax(1) / cls.top).clamp(min=torch.finfo(torch.float32).eps).bfloat16()
        q = weight / scales.float()[:, None]  # a scale may have been rounded down
        q = q.clamp(-cls.top, cls.top) if cls.dtype.is_floating_point else q.round().clamp(-128, 127)
        return {"weight": q.to(cls.dtype), "scales": scales}


class FP8(Int8):
    """8-bit floating point (e4m3, arXiv 2209.05433), one scale per output row."""

    dtype, top = torch.float8_e4m3fn, 448


class Grouped(Plain):
    """int8 or fp8 in groups of G = 16, 32, 64, 128 or 256 along K, the last one perhaps smaller, as other programs'
    files have them: w = q * scale [+ zero]."""

    @staticmethod
    def matches(weight: Tensor, shapes: dict[str, tuple], rows: tuple[int, ...], K: int) -> bool:
        counts = {math.ceil(K / G) for G in GROUPS8}
        fitting = [{"weight": (*rows, K), "scales": (*rows, n)} for n in counts if len(rows) == 1]
        fitting += [of | {"zeros": of["scales"]} for of in fitting]
        return weight.dtype in (torch.int8, torch.float8_e4m3fn) and shapes in fitting

    @staticmethod
    def columns(tensors: dict[str, Tensor], part: range) -> dict[str, Tensor]:
        """A group that straddles two ranks becomes smaller ones of the same scale, on both of them."""
        weight, scales, four = tensors["weight"], tensors["scales"], tensors["weight"].dtype is torch.uint8
        old = 2 * weight.shape[1] // scales.shape[1] if four else ops.group_size(weight.shape[1], scales.shape[1])
        new = math.gcd(old, part.start)
        if new not in (GROUPS if four else GROUPS8):  # heads of an odd size: keep the values, give up the format
            plain = ops.dequantize(weight, scales, tensors.get("zeros"), torch.float32)
            return {k: t for k, t in tensors.items() if k == "bias"} | {"weight": cut(plain, 1, part)}
        count = math.ceil(len(part) / new)
        group = ((part.start + torch.arange(count) * new) // old).clamp(max=scales.shape[1] - 1)  # of each new one
        own = {key: t[:, group] for key, t in tensors.items() if key in ("scales", "zeros")}
        piece = range(part.start // 2, (part.start + count * new) // 2) if four else part
        return {**tensors, "weight": cut(weight, 1, piece), **own}


class Int4(Grouped):
    """Asymmetric int4 in groups of G = 32, 64, 128 or 256 along K (padded to K'): w = (q - 8) * scale + zero."""

    @staticmethod
    def matches(weight: Tensor, shapes: dict[str, tuple], rows: tuple[int, ...], K: int) -> bool:
        groups = ((G, math.ceil(K / G)) for G in GROUPS)
        fitting = ({"weight": (*rows, n * G // 2)} | dict.fromkeys(("scales", "zeros"), (*rows, n)) for G, n in groups)
        return weight.dtype is torch.uint8 and shapes in fitting

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
        scales, zeros = Int4.grid(groups)
        return Int4.tensors(Int4.round(groups, scales, zeros).flatten(1), scales[..., 0], zeros[..., 0])

    @staticmethod
    def tensors(q: Tensor, scales: Tensor, zeros: Tensor) -> dict[str, Tensor]:
        """As on disk, from q (N, K') in 0..15 and scales and zeros (N, K'/G) that bf16 holds exactly."""
        q = q.to(torch.uint8)
        return {"weight": q[:, ::2] | q[:, 1::2] << 4, "scales": scales.bfloat16(), "zeros": zeros.bfloat16()}


class MXFP4(Int4):
    """4-bit floating point (e2m1) in groups of 32 that share a power of two (OCP Microscaling Formats 1.0)."""

    @staticmethod
    def matches(weight: Tensor, shapes: dict[str, tuple], rows: tuple[int, ...], K: int) -> bool:
        n = math.ceil(K / 32)
        return weight.dtype is torch.uint8 and shapes == {"weight": (*rows, 16 * n), "scales": (*rows, n)}


KINDS = (Plain, Int8, FP8, Grouped, Int4)


def kind_of(shape: tuple[int, ...], tensors: dict[str, Tensor], name: str) -> type[Plain]:
    """The kind that dtypes and shapes tell. Raises UserError where they tell of no linear layer of this shape, (N, K)
    or experts' (E, N, K)."""
    *rows, K = shape
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    others = [key for key, t in tensors.items() if key != "weight" and t.dtype not in FLOATS]
    exponents = others == ["scales"] and tensors["scales"].dtype is torch.uint8
    if (exponents or not others) and shapes.pop("bias", tuple(rows)) == tuple(rows) and "weight" in shapes:
        for kind in (MXFP4,) if exponents else KINDS:
            if kind.matches(tensors["weight"], shapes, tuple(rows), K):
                return kind
    found = ", ".join(f"{key} {str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for key, t in tensors.items())
    raise UserError(
        f"{name or 'a linear layer'} needs a plain, int8, fp8, int4 or mxfp4 weight for {list(shape)}; "
        f"found {found or 'none'}"
    )


class Linear(nn.Module):
    """A linear layer (N, K), or a rank's part of it, of any kind of weight. Build it under torch.device("meta").

    rows: the rows of the weight that this rank holds (column-parallel, in Megatron-LM's words), all by default; its
    result has these features only, or with `gather` those of all ranks. columns: the columns that it holds
    (row-parallel), which meet that part of x; the result is the sum over the ranks. fp32: the result's dtype, else x's.
    experts: so many layers of one shape, of which ops.mixture computes those that a token is sent to.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        tp: TensorParallel | None = None,
        rows: Sequence[range] = (),
        columns: range | None = None,
        gather: bool = False,
        fp32: bool = False,
        experts: int = 0,
    ):
        super().__init__()
        tp = tp or TensorParallel()
        self.experts = (experts,) if experts else ()
        self.shape = (*self.experts, out_features, in_features)  # of the whole weight
        self.rank, self.world, self.rows, self.columns = tp.rank, tp.world, rows, columns
        self.in_features = in_features if columns is None else len(columns)
        self.out_features = sum(map(len, rows)) if rows else out_features
        self.reduce = "" if tp.world == 1 else "gather" if gather else "sum" if columns is not None else ""
        self.fp32, self.swiglu = fp32, False
        self.kind: type[Plain] = Plain
        for name in ("weight", "bias", "scales", "zeros"):
            self.register_parameter(name, None)
        own = (*self.experts, self.out_features)
        self.assign({"weight": torch.empty(*own, self.in_features)} | ({"bias": torch.empty(own)} if bias else {}))
        self.backends: tuple[Callable, ...] = (ops.plain,)

    def assign(self, tensors: dict[str, Tensor], name: str = "") -> "Linear":
        """Take these tensors (weight; scales, zeros, bias where there are any), as on disk, of this rank's part.
        Nothing is copied. Raises UserError where they make up no such layer."""
        self.kind = kind_of((*self.experts, self.out_features, self.in_features), tensors, name)
        for key in ("weight", "bias", "scales", "zeros"):
            setattr(self, key, nn.Parameter(tensors[key], requires_grad=False) if key in tensors else None)
        return self

    def shard(self, tensors: dict[str, Tensor], name: str = "") -> dict[str, Tensor]:
        """This rank's part of the whole layer's tensors. Only that part of a mapped file is read. Raises UserError
        where they make up no such layer."""
        kind, axis = kind_of(self.shape, tensors, name), len(self.experts)
        if self.world == 1:
            return tensors
        if self.columns is None:
            return {key: cut(t, axis, *self.rows) if self.rows else t for key, t in tensors.items()}
        matrices = {k: t.flatten(0, axis) for k, t in tensors.items() if k != "bias" or self.rank == 0}
        return {k: t.unflatten(0, self.shape[:-1]) for k, t in kind.columns(matrices, self.columns).items()}

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight as the matrix (N, K), or the matrices (E, N, K), that it stands for."""
        return ops.dequantize(self.weight, self.scales, self.zeros, dtype)[..., : self.out_features, : self.in_features]

    def pack(self, dtype: torch.dtype = torch.bfloat16) -> None:
        """Lay the weight out for the device it is on and activations of `dtype`. Called once, after loading."""
        if not self.experts:
            ops.prepare_linear(self, dtype)

    def forward(self, x: Tensor, norm: nn.RMSNorm | None = None, residual: Tensor | None = None) -> Tensor:
        """[residual +] W norm(x) [+ bias]: x (..., K) -> (..., N) in x's dtype, or fp32 if the layer is such."""
        y = ops.linear(self, x, norm, residual)
        return y[..., : self.shape[0]] if self.reduce == "gather" else y  # the last rank may end in padding


def interleaved(gate: Linear, up: Linear) -> Linear | None:
    """SwiGLU's two layers as one that makes silu(gate x) * up x, if they are of one kind: rows interleaved by 8."""
    ours, theirs = dict(gate.named_parameters()), dict(up.named_parameters())
    kinds = [{name: (t.dtype, t.shape) for name, t in own.items()} for own in (ours, theirs)]
    if gate.out_features % 8 or kinds[0] != kinds[1]:
        return None
    n = len(gate.experts)  # the axis of rows
    pairs = {k: torch.stack([t.unflatten(n, (-1, 8)) for t in (ours[k], theirs[k])], n + 1) for k in ours}
    blocks = {k: pair.flatten(n, n + 2) for k, pair in pairs.items()}
    with torch.device("meta"):
        both = Linear(gate.in_features, 2 * gate.out_features, experts=sum(gate.experts)).assign(blocks)
    both.swiglu = True
    return both


def quantizer(mode: str) -> Callable[[Tensor], dict[str, Tensor]]:
    """What quantises a weight (N, K), a row at a time as far as the result goes, to "int8", "fp8", "int4" (in groups of
    32) or "int4:GROUP". Raises UserError for any other mode or group."""
    modes = {"int8": Int8.quantize, "fp8": FP8.quantize, "int4": partial(Int4.quantize, group=32)}
    modes |= {f"int4:{group}": partial(Int4.quantize, group=group) for group in GROUPS}
    if mode not in modes:
        raise UserError(f"cannot quantise to {shown(mode)}; accepted: {', '.join(modes)}")
    return modes[mode]


def quantize_linear(
    mode: str, tensors: dict[str, Tensor], name: str, device: torch.device | str | None = None
) -> dict[str, Tensor]:
    """A linear layer's tensors (weight (N, K) or (E, N, K) and perhaps bias) with the weight quantised on `device` (by
    default where it is), some rows at a time; the bias stays as it is.

    Raises UserError for an unknown mode, and for a weight that is absent, quantised already or not finite.
    """
    quantize, weight = quantizer(mode), tensors.get("weight")
    if weight is None:
        raise UserError(f"{name} has no weight")
    if "scales" in tensors or weight.dtype.itemsize < 2:
        raise UserError(f"{name} is quantised already ({weight.dtype}); give the full-precision checkpoint")
    device, lead, weight = weight.device if device is None else device, weight.shape[:-1], weight.flatten(0, -2)
    out = {key: torch.empty_like(t, device=device) for key, t in quantize(weight.to("meta")).items()}
    step = max(1, CHUNK // weight.shape[1])
    length = 0 if out["weight"].is_meta else len(weight)  # where there is no memory, nothing to compute
    for rows in (slice(start, start + step) for start in range(0, length, step)):
        piece = weight[rows].to(device)
        if not piece.isfinite().all():
            raise UserError(f"{name} holds NaN or infinite weights")
        for key, tensor in quantize(piece).items():
            out[key][rows] = tensor
    return tensors | {key: t.unflatten(0, lead) for key, t in out.items()}
