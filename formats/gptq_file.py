"""GPTQ's files, as AutoGPTQ and GPTQModel write them: qweight, qzeros, scales and g_idx of each module.

qweight int32 (K / P, N), P = 32 / bits integers of a column of W along K in a word; scales (n, N); qzeros int32
(n, N / P), points along N, in version 1 ("gptq") less one; g_idx int32 (K,), each input's group.
w = (q - point) * scale. Reference: https://github.com/ModelCloud/GPTQModel.
"""

import torch
from torch import Tensor

from errors import UserError
from formats.fields import either, flag, integer, text
from formats.module import FLOATS, Module, unpacked
from formats.quantised import affine
from formats.source import Lazy

SETTINGS = {
    "bits": either(integer(4, 4), integer(8, 8)),
    "group_size": either(integer(), integer(-1, -1)),
    "checkpoint_format": text(("gptq", "gptq_v2"), default="gptq"),
    "sym": flag(default=True),
    "desc_act": flag(default=False),
}


def weight(module: Module, settings: dict) -> Lazy:
    bits, P = settings["bits"], 32 // settings["bits"]
    words, N = module.shape("qweight", None, None)
    K = words * P
    group = K if settings["group_size"] == -1 else settings["group_size"]
    n = -(-K // group)
    module.shape("scales", n, N)
    module.shape("qzeros", n, N // P)
    middle, less = 1 << bits - 1, int(settings["checkpoint_format"] == "gptq")

    def q() -> Tensor:
        return unpacked(module.read("qweight", torch.int32), bits, 0).t().short() - middle

    def grid() -> tuple[Tensor, Tensor]:
        points = unpacked(module.read("qzeros", torch.int32), bits, 1) + less & (1 << bits) - 1  # as AutoGPTQ: modulo
        return module.read("scales", *FLOATS).t(), points.t().short() - middle

    order = None
    if "g_idx" in module:
        module.shape("g_idx", K)
        order = module.read("g_idx", torch.int32, torch.int64)
        if not 0 <= order.min() <= order.max() < n:
            raise UserError(f"{module.name}.g_idx names groups {order.min()} to {order.max()}; there are {n}")
    return affine((N, K), bits, group, q, grid, order)
