"""FP8 checkpoints, as DeepSeek and Qwen publish them: weight float8_e4m3fn (N, K), and its scale.

weight_scale_inv (ceil(N / block), ceil(K / block)), which in spite of its name is multiplied with; weight_scale, and
any of one number or of one a row, likewise. Reference: transformers' integrations/finegrained_fp8.py.
"""

import torch
from torch import Tensor

from errors import UserError
from formats.fields import integer, list_of
from formats.module import FLOATS, Module
from formats.quantised import layout_of, stored, tensors_of
from formats.source import Lazy

SETTINGS = {"weight_block_size": list_of(integer(), default=())}


def weight(module: Module, settings: dict) -> Lazy | None:
    key = next((key for key in ("weight_scale_inv", "weight_scale") if key in module), "weight_scale_inv")
    return scaled(module, key, tuple(settings.get("weight_block_size", ())))


def scaled(module: Module, key: str, block: tuple[int, ...]) -> Lazy:
    """The fp8 weight with the scale `key` for all of it, each row, or each block (rows, columns)."""
    N, K = module.shape("weight", None, None)
    shape, rows, group = module.shape(key), N, 0
    if shape in ((N,), (N, 1)) and not block:
        rows = 1
    elif shape not in ((), (1,), (1, 1)):
        if len(block) != 2:
            raise UserError(f"{module.name}.{key} has shape {list(shape)}, and the config no weight_block_size of two")
        rows, group = block
        module.shape(key, -(-N // rows), -(-K // group))
    if group >= K:
        group = 0
    dtypes = (*FLOATS, torch.float8_e8m0fnu)
    dtype = torch.float32 if (found := module.read(key, *dtypes).dtype) is torch.float8_e8m0fnu else found
    layout = layout_of("fp8", group, K, dtype)

    def grid() -> Tensor:
        scales = module.read(key, *dtypes).to(dtype)
        return scales.reshape(-(-N // rows), -1).repeat_interleave(rows, 0)[:N]

    if layout is None:
        dense = lambda: module.read("weight", torch.float8_e4m3fn).float() * _columns(grid().float(), group, K)  # noqa: E731
        return Lazy((N, K), dense, None, f"blocks of {group} inputs fit no layout")
    return stored(
        (N, K), layout, lambda: tensors_of(layout, module.read("weight", torch.float8_e4m3fn), grid(), None, group)
    )


def _columns(scales: Tensor, group: int, K: int) -> Tensor:
    return scales[:, torch.arange(K) // (group or K)]
