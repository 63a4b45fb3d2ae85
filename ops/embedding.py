"""Token ids to embeddings, from a table of which each rank may hold some rows.

Axes: B rows, T tokens a row known by position, S new ones, C features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.common import on_triton, op, pdl, tl, tlx, triton


@op("embed")
def embed(table: Tensor, tokens: Tensor, start: Tensor | None, S: int, first: int | None = None) -> Tensor:
    """Rows of table (n, C) for S tokens of tokens int64 (B, T), from start (B,) int64 on or the first ones: (B, S, C).

    If the table is part of one, from row `first` on, tokens of other parts get zeros.
    """
    return (embedding_triton if on_triton(table) else embedding_plain)(table, tokens, start, S, first)


@torch.library.register_fake("gptfast::embed")
def embedding_fake(table, tokens, start, S, first=None):
    return table.new_empty(len(tokens), S, table.shape[1])


def embedding_plain(table, tokens, start, S, first=None):
    if start is not None:
        tokens = tokens.gather(1, start[:, None] + torch.arange(S, device=tokens.device))
    tokens = tokens[:, :S]
    if first is None:
        return F.embedding(tokens, table)
    tokens = tokens - first
    inside = (tokens >= 0) & (tokens < len(table))
    return F.embedding(torch.where(inside, tokens, 0), table) * inside[..., None]


def embedding_triton(table, tokens, start, S, first=None):
    """One launch."""
    (B, T), (n, C) = tokens.shape, table.shape
    out = embedding_fake(table, tokens, start, S)
    _embedding_kernel[(B * S, triton.cdiv(C, 1024))](
        out, table, tokens.contiguous(), start, S, T, first or 0, n, C,
        BLOCK=1024, num_warps=4, **pdl(table.device),
    )  # fmt: skip
    return out


if triton is not None:

    @triton.jit(do_not_specialize=["S", "T"])  # a prompt of any length must not have to wait for a compiler
    def _embedding_kernel(out, table, tokens, start, S, T, first, rows, C, BLOCK: tl.constexpr, PDL: tl.constexpr):
        row = tl.program_id(0)
        c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        if PDL:
            tlx.gdc_launch_dependents()
            tlx.gdc_wait()
        at = row // S * T + row % S
        if start is not None:
            at += tl.load(start + row // S)
        token = tl.load(tokens + at) - first
        x = tl.load(table + token * C + c, mask=(token >= 0) & (token < rows) & (c < C), other=0.0)
        tl.store(out + row.to(tl.int64) * C + c, x, mask=c < C)
