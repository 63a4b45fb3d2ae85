"""Prompt lookup's n-gram match: draft tokens copied from where a row's last tokens occurred before.

find(history, pos)            where, and how many tokens match
copy_match(history, pos, k)   copy what followed, as an op: one Triton kernel, or plain PyTorch
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.common import on_triton, op, pdl, tl, tlx, triton

NGRAM = 6  # the longest match that is looked for


def find(history: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
    """The latest place before pos (B,) where most of the last NGRAM tokens of history (B, width) occurred, and how many
    of them match (0: none): int64 (B,) both."""
    pos, width = pos[:, None], history.shape[1]
    windows = F.pad(history, (NGRAM - 1, 0), value=-1).unfold(1, NGRAM, 1)  # (B, width, NGRAM), by last position
    last = windows.gather(1, pos[..., None].expand(-1, -1, NGRAM))
    length = (windows == last).flip(2).cumprod(2).sum(2)
    at = torch.arange(width, device=history.device)
    best = torch.where(at < pos, length * width + at, 0).amax(1)
    return best % width, best // width


@op("copy_match", mutates=("history",))
def copy_match(history: Tensor, pos: Tensor, k: int) -> None:
    """Write k draft tokens behind each row's position pos int64 (B,) into history int64 (B, width): what followed the
    place that `find` finds. A copy that reaches the position starts over."""
    (copy_match_triton if on_triton(history) else copy_match_plain)(history, pos, k)


@torch.library.register_fake("gptfast::copy_match")
def _(history, pos, k):
    return None


def copy_match_plain(history, pos, k):
    found = find(history, pos)[0][:, None]
    pos, offset = pos[:, None], torch.arange(k, device=history.device)
    history.scatter_(1, pos + 1 + offset, history.gather(1, found + 1 + offset % (pos - found)))


def copy_match_triton(history, pos, k):
    """One launch, history and pos contiguous."""
    _copy_match_kernel[(len(history),)](
        history, pos, history.shape[1], k, NGRAM=NGRAM, K2=triton.next_power_of_2(k), BLOCK=1024,
        num_warps=8, **pdl(history.device),
    )  # fmt: skip


if triton is not None:

    @triton.jit
    def _copy_match_kernel(
        history, pos, width, k, NGRAM: tl.constexpr, K2: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
    ):
        if PDL:
            tlx.gdc_launch_dependents()
            tlx.gdc_wait()
        history += tl.program_id(0).to(tl.int64) * width
        end = tl.load(pos + tl.program_id(0)).to(tl.int32)
        best = tl.zeros((BLOCK,), tl.int64)  # length of the match and its place
        for start in range(0, end, BLOCK):
            at = start + tl.arange(0, BLOCK)
            matches = at < end
            length = tl.zeros((BLOCK,), tl.int64)
            for i in tl.static_range(NGRAM):
                last = tl.load(history + end - i, mask=end >= i, other=-1)
                matches &= tl.load(history + at - i, mask=(at < end) & (at >= i), other=-1) == last
                length += matches.to(tl.int64)
            best = tl.maximum(best, tl.where(at < end, length * width + at, 0))
        found = (tl.max(best, 0) % width).to(tl.int32)
        offset = tl.arange(0, K2)
        copied = tl.load(history + found + 1 + offset % tl.maximum(end - found, 1), mask=offset < k)
        tl.store(history + end + 1 + offset, copied, mask=offset < k)
