"""4-bit floating point (e2m1): NVFP4 of compressed-tensors and modelopt, MXFP4 of compressed-tensors.

Two values are a byte, the first one in the low bits. Twice a value is an integer, so int8 in groups holds them:

    NVFP4  groups of 16 with a scale in e4m3 and one of the tensor: w = q * scale / weight_global_scale
           (compressed-tensors) or w = q * scale * weight_scale_2 (modelopt)
    MXFP4  groups of 32 with a scale in e8m0: w = q * 2^(scale - 127)

Specification: https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf.
"""

import torch
from torch import Tensor

from formats.fields import text
from formats.module import Module
from formats.quantised import affine
from formats.source import Lazy

SETTINGS = {"quant_algo": text(("NVFP4", "FP8"), default="NVFP4")}
TWICE = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=torch.int8)


def twice(packed: Tensor) -> Tensor:
    """Twice the values of bytes uint8 (..., n), int8 (..., 2 n)."""
    return TWICE[torch.stack((packed & 15, packed >> 4), -1).flatten(-2).int()]


def power(exponents: Tensor) -> Tensor:
    """2^(e - 127) of e8m0's bytes, fp32."""
    return torch.exp2(exponents.view(torch.uint8).float() - 127)


def weight(module: Module, settings: dict) -> Lazy:
    """compressed-tensors' weight_packed, or modelopt's weight."""
    key = "weight_packed" if "weight_packed" in module else "weight"
    N, K = module.shape(key, None, None)
    K *= 2
    mx = "weight_global_scale" not in module and "weight_scale_2" not in module
    group = 32 if mx else 16
    module.shape("weight_scale", N, -(-K // group))
    for of_all in ("weight_global_scale", "weight_scale_2"):
        if of_all in module and module.shape(of_all):
            module.shape(of_all, 1)

    def grid() -> tuple[Tensor, None]:
        if mx:
            return power(module.read("weight_scale", torch.uint8, torch.float8_e8m0fnu)) / 2, None
        scales = module.read("weight_scale", torch.float8_e4m3fn).float()
        if "weight_global_scale" in module:
            return scales / module.read("weight_global_scale", torch.float32) / 2, None
        return scales * module.read("weight_scale_2", torch.float32) / 2, None

    return affine((N, K), 8, group, lambda: twice(module.read(key, torch.uint8)), grid)


def modelopt(module: Module, settings: dict) -> Lazy:
    """NVFP4, or FP8 with a scale of the tensor."""
    from formats import fp8_block

    return weight(module, settings) if settings["quant_algo"] == "NVFP4" else fp8_block.weight(module, {})
