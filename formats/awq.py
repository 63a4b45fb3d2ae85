"""AWQ's files (arXiv 2306.00978), as AutoAWQ writes them: qweight, qzeros and scales of each module, 4 bits.

gemm: qweight int32 (K, N / 8), 8 columns of N in a word in the order 0 2 4 6 1 3 5 7; qzeros (n, N / 8) likewise,
      scales (n, N)
gemv: qweight int32 (N, K / 8), in order; qzeros (N, n' / 8) and scales (N, n'), n' being n padded
w = (q - point) * scale. Reference: https://github.com/casper-hansen/AutoAWQ.
"""

import torch
from torch import Tensor

from formats.fields import flag, integer, text
from formats.module import FLOATS, Module, unpacked
from formats.quantised import affine
from formats.source import Lazy

SETTINGS = {
    "bits": integer(4, 4, default=4),
    "group_size": integer(-1, default=128),
    "version": text(("gemm", "gemv", "GEMM", "GEMV"), default="gemm"),
    "zero_point": flag(default=True),
}
_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # of columns 0 to 7 in a word


def weight(module: Module, settings: dict) -> Lazy:
    gemv = settings["version"].lower() == "gemv"
    rows, words = module.shape("qweight", None, None)
    N, K = (rows, words * 8) if gemv else (words * 8, rows)
    group = K if settings["group_size"] < 1 else settings["group_size"]
    n = -(-K // group)
    padded = module.shape("scales", N, None)[1] if gemv else module.shape("scales", n, N)[0]
    if settings["zero_point"]:
        module.shape("qzeros", *((N, -(-padded // 8)) if gemv else (n, N // 8)))
    if padded < n:
        module.shape("scales", N, n)  # raises

    def ordered(words: Tensor) -> Tensor:
        q = unpacked(words, 4, 1)
        return q if gemv else q.unflatten(1, (-1, 8))[:, :, _PLACES].flatten(1).t()

    def grid() -> tuple[Tensor, Tensor | None]:
        scales = module.read("scales", *FLOATS)
        points = ordered(module.read("qzeros", torch.int32)).short()[:, :n] - 8 if settings["zero_point"] else None
        return (scales[:, :n] if gemv else scales.t()), points

    return affine((N, K), 4, group, lambda: ordered(module.read("qweight", torch.int32)).short() - 8, grid)
