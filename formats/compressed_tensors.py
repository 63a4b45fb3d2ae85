"""compressed-tensors, the format of llm-compressor and vLLM: what a module's tensors are is told by them.

weight_packed int32 (N, K / P), P integers of 4 or 8 bits in a word, plus half their range (pack-quantized);
weight_packed uint8 (N, K / 2), fp4 (nvfp4- and mxfp4-pack-quantized, see fp4.py); weight int8 or float8_e4m3fn (N, K)
(int-, float- and naive-quantized). weight_scale: of the tensor (1,), rows (N, 1), groups (N, n) or blocks;
weight_zero_point like it, int8 or packed along N; weight_g_idx, each input's group. w = (q - point) * scale.
Reference: https://github.com/vllm-project/compressed-tensors.
"""

import torch
from torch import Tensor

from errors import UserError, shown
from formats import fp4, fp8_block
from formats.fields import mapping, text
from formats.module import FLOATS, Module, unpacked
from formats.quantised import affine
from formats.source import Lazy

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
FORMATS += ("nvfp4-pack-quantized", "mxfp4-pack-quantized")
SETTINGS = {"format": text(FORMATS), "config_groups": mapping(default={})}


def weight(module: Module, settings: dict) -> Lazy | None:
    arguments = [group.get("weights") for group in settings["config_groups"].values() if isinstance(group, dict)]
    arguments = [own for own in arguments if isinstance(own, dict)]
    if "weight_packed" in module:
        if "weight_shape" not in module:
            return fp4.weight(module, settings)
        return _packed(module, arguments)
    if "weight" not in module:
        module.shape("weight_packed")  # raises
    if module.tensors["weight"].read().dtype is torch.int8:
        N, K = module.shape("weight", None, None)
        return _integers(module, 8, N, K, lambda: module.read("weight", torch.int8), arguments)
    blocks = [own["block_structure"] for own in arguments if isinstance(own.get("block_structure"), list)]
    return fp8_block.scaled(module, "weight_scale", tuple(blocks[0]) if blocks else ())


def _packed(module: Module, arguments: list[dict]) -> Lazy:
    module.shape("weight_shape", 2)
    N, K = module.read("weight_shape", torch.int32, torch.int64).tolist()
    words = module.shape("weight_packed", N, None)[1]
    bits = next((bits for bits in (4, 8) if words == -(-K * bits // 32)), None)
    if bits is None or (arguments and bits not in [own.get("num_bits") for own in arguments]):
        told = shown([own.get("num_bits") for own in arguments])
        raise UserError(
            f"{module.name}.weight_packed has {words} words for {K} inputs, of {told} bits; 4 and 8 are supported"
        )

    def q() -> Tensor:
        words = unpacked(module.read("weight_packed", torch.int32), bits, 1)
        return words[:, :K].short() - (1 << bits - 1)

    return _integers(module, bits, N, K, q, arguments)


def _integers(module: Module, bits: int, N: int, K: int, q, arguments: list[dict]) -> Lazy:
    shape = module.shape("weight_scale")
    n = 1 if shape in ((), (1,), (N,)) else module.shape("weight_scale", N, None)[1]
    sizes = [own["group_size"] for own in arguments if type(own.get("group_size")) is int and own["group_size"] > 0]
    group = next((size for size in sizes if -(-K // size) == n), K // n if K % n == 0 and not sizes else 0)
    if n > 1 and not group:
        raise UserError(f"{module.name}.weight_scale has {n} groups for {K} inputs; the config says {shown(sizes)}")

    def grid() -> tuple[Tensor, Tensor | None]:
        scales = module.read("weight_scale", *FLOATS).reshape(-1, n).expand(N, n)
        if "weight_zero_point" not in module:
            return scales, None
        points = module.read("weight_zero_point", torch.int8, torch.int32, torch.int64)
        if points.dtype is torch.int32:
            points = unpacked(points, bits, 0)[:N].short() - (1 << bits - 1)
        if points.numel() not in (n, N * n):
            raise UserError(f"{module.name}.weight_zero_point has {points.numel()} values for {N} x {n} groups")
        return scales, points.reshape(-1, n).expand(N, n)

    order = None
    if "weight_g_idx" in module:
        module.shape("weight_g_idx", K)
        order = module.read("weight_g_idx", torch.int32, torch.int64)
        if order.max() >= n or (order.min() < 0 and (order != -1).any()):
            raise UserError(f"{module.name}.weight_g_idx names group {order.max()}; there are {n}")
        order = None if (order == -1).all() else order
    return affine((N, K), bits, group if n > 1 else 0, q, grid, order)
