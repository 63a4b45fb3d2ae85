"""Weights that other programs have quantised, in linear.py's layouts: the same values, without rounding them again.

A file's reader (gptq_file.py, ...) makes integers and scales of its tensors, and `affine` or `stored` a Lazy of these.
Where no layout of ours holds them, the Lazy is a weight in floating point, and says why.
"""

import math
from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import ops
from formats.source import Lazy
from linear import GROUPS, GROUPS8


class Layout(NamedTuple):
    """What linear.py's tensors of a weight (N, K) are: int4 or mxfp4, or int8 or fp8 in groups or with a scale per
    row."""

    bits: str  # int4, mxfp4, int8 or fp8
    group: int  # 0: a scale per row
    scales: torch.dtype
    zeros: torch.dtype | None  # int4 always has some

    def like(self, *shape: int) -> dict[str, Tensor]:
        """The tensors, on the meta device."""
        *rows, K = shape
        n = math.ceil(K / self.group) if self.group else 0
        shape = (*rows, n) if self.group else rows
        dtype = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}.get(self.bits, torch.uint8)
        width = n * self.group // 2 if dtype is torch.uint8 else K
        weight = torch.empty(*rows, width, dtype=dtype, device="meta")
        out = {"weight": weight, "scales": torch.empty(shape, dtype=self.scales, device="meta")}
        return out if self.zeros is None else out | {"zeros": torch.empty(shape, dtype=self.zeros, device="meta")}


def layout_of(bits: str, group: int, K: int, scales: torch.dtype, zeros: torch.dtype | None = None) -> Layout | None:
    """The layout for groups of a file, 0 or the whole row being one; None where there is none."""
    if bits != "int4" and zeros is None and group in (0, K):
        return Layout(bits, 0, scales, None)
    group = math.gcd(group, 256) if 0 < group < K else 256 if K > 128 else 128 if K > 64 else 64 if K > 32 else 32
    if bits == "int4" and group not in GROUPS:
        bits = "int8"
    zeros = zeros or (scales if bits == "int4" else None)
    return Layout(bits, group, scales, zeros) if group in GROUPS8 else None


def tensors_of(layout: Layout, q: Tensor, scales: Tensor, zeros: Tensor | None, group: int) -> dict[str, Tensor]:
    """q (N, K), of int4 in -8..7; scales and zeros (N, n) of groups of `group` along K, 0 being the whole row, so that
    w = q * scale [+ zero]."""
    K = q.shape[1]
    if layout.group:
        index = torch.arange(0, K, layout.group) // (group or K)
        scales, zeros = scales[:, index], None if zeros is None else zeros[:, index]
    else:
        scales = scales.flatten()
    out = {"weight": q, "scales": scales.to(layout.scales)}
    if layout.zeros is not None:
        out["zeros"] = torch.zeros_like(scales, dtype=layout.zeros) if zeros is None else zeros.to(layout.zeros)
    if layout.bits == "int4":
        q = F.pad(q.to(torch.int8) + 8, (0, -K % layout.group), value=8).to(torch.uint8)
        out["weight"] = q[:, ::2] | q[:, 1::2] << 4
    elif layout.bits == "int8":
        out["weight"] = q.to(torch.int8)
    return {key: t.contiguous() for key, t in out.items()}


def dense_of(tensors: dict[str, Tensor], K: int) -> Tensor:
    """The weight (N, K) that tensors stand for, in fp32."""
    return ops.dequantize(tensors["weight"], tensors["scales"], tensors.get("zeros"), torch.float32)[..., :K]


MXFP4 = Layout("mxfp4", 32, torch.uint8, None)


class Quantised(NamedTuple):
    """A weight in a layout, as its tensors."""

    layout: Layout
    read: Callable[[], dict[str, Tensor]]

    def rows(self, rows: slice | tuple[slice, ...]) -> "Quantised":
        return Quantised(self.layout, lambda: {key: t[rows] for key, t in self.read().items()})


def stored(shape: tuple[int, ...], layout: Layout, read: Callable[[], dict[str, Tensor]]) -> Lazy:
    """A weight of which `read` gives linear.py's tensors."""
    return Lazy(shape, lambda: dense_of(read(), shape[-1]), Quantised(layout, read))


def affine(
    shape: tuple[int, int],
    bits: int,
    group: int,
    q: Callable[[], Tensor],
    grid: Callable[[], tuple[Tensor, Tensor | None]],
    order: Tensor | None = None,
) -> Lazy:
    """A weight w = (q - point) * scale of 4 or 8 bits, (N, K), with groups along K, 0 being the whole row.

    q: gives integers (N, K) in -8..7 or -128..127; grid: gives scales and points, or None for 0, (N, n); it is small,
    and called beforehand as well. order: the group of each column, where it is not that of its place.
    """
    scales, points = grid()
    zeros = torch.float32 if points is not None and points.any() else None  # exact there
    K, n = shape[1], scales.shape[1]
    ranked = order is None or torch.equal(order.long(), torch.arange(K) // (group or K))
    layout = layout_of(f"int{bits}", group, K, scales.dtype, zeros) if ranked else None

    def tensors() -> dict[str, Tensor]:
        scales, points = grid()
        return tensors_of(layout, q(), scales, None if zeros is None else -points.float() * scales.float(), group)

    def dense() -> Tensor:
        scales, points = grid()
        of = torch.arange(K) // (group or K) if ranked else order.long()
        return (q() - (0 if points is None else points.float()[:, of])) * scales.float()[:, of]

    if layout is not None:
        return stored(shape, layout, tensors)
    why = f"{n} groups of {group} inputs fit no layout" if ranked else "its groups are not of neighbours (desc_act)"
    return Lazy(shape, dense, None, why)


def merge(parts: list[Lazy], experts: bool = False) -> tuple[dict[str, Tensor], Callable[[], dict]] | None:
    """Weights whose rows are stacked, or experts' of one shape (E, N, K): the tensors' like, and what reads them. None
    where no layout holds them all."""
    if not all(part.quantised for part in parts):
        return None
    rows, *rest = parts[0].shape
    shape = (len(parts), rows, *rest) if experts else (sum(part.shape[0] for part in parts), *rest)
    layout, K = reduce(_common, (part.quantised.layout for part in parts)), shape[-1]
    if layout is None or (experts and layout.group and layout.bits not in ("int4", "mxfp4")):  # as linear.py has it
        return None

    def read() -> dict[str, Tensor]:
        own = [_widened(part.quantised.read(), part.quantised.layout, layout, K) for part in parts]
        join = torch.stack if experts else torch.cat
        return {key: join([_bytes(each[key]) for each in own]).view(own[0][key].dtype) for key in own[0]}

    return layout.like(*shape), read


def _bytes(t: Tensor) -> Tensor:
    return t.view(torch.uint8) if t.dtype is torch.float8_e4m3fn else t  # which PyTorch does not concatenate everywhere


def _common(a: Layout | None, b: Layout) -> Layout | None:
    """The narrowest layout that holds both."""
    if a is None or a == b:
        return a
    if a.bits != b.bits and {a.bits, b.bits} & {"fp8", "mxfp4"}:
        return None
    zeros = [layout.zeros for layout in (a, b) if layout.zeros is not None]
    return Layout(
        a.bits if a.bits == b.bits else "int8",
        math.gcd(a.group, b.group) if a.group and b.group else a.group or b.group,
        torch.promote_types(a.scales, b.scales),
        reduce(torch.promote_types, zeros) if zeros else None,
    )


def _widened(tensors: dict[str, Tensor], of: Layout, to: Layout, K: int) -> dict[str, Tensor]:
    """The tensors of one layout in a wider one."""
    if of == to:
        return tensors
    q, scales, zeros = tensors["weight"], tensors["scales"], tensors.get("zeros")
    if of.bits == "int4":
        q = torch.stack((q & 15, q >> 4), -1).flatten(1)[:, :K].to(torch.int8) - 8
    return tensors_of(to, q, scales if of.group else scales[:, None], zeros, of.group)
