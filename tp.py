"""Tensor parallelism over torchrun's processes: who holds which part of which weight.

wqkv, w1, w3 and the vocabulary of embedding and output are split by rows, wo and w2 by columns (Megatron-LM, arXiv
1909.08053), so a layer needs two sums over the ranks. Rank 0's share of a sum includes the bias.

    with session() as tp:  # of process/ranks.py; alone, without torchrun
        model = load_model(path, tp=tp)
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from errors import UserError


@dataclass(frozen=True)
class TensorParallel:
    """This process's place among the ranks. By default it is alone, and nothing is split."""

    rank: int = 0
    world: int = 1

    def part(self, size: int, unit: int) -> range:
        """This rank's part of range(size), in whole units; all are equally long, so the last may reach past the end."""
        n = size if self.world == 1 else math.ceil(size / (self.world * unit)) * unit
        return range(self.rank * n, (self.rank + 1) * n)

    @staticmethod
    def worlds(n_head: int, n_local_heads: int) -> list[int]:
        """World sizes over which heads divide."""
        return [w for w in range(1, n_head + 1) if n_head % w == 0 and 0 in (n_local_heads % w, w % n_local_heads)]

    def heads(self, n_head: int, n_local_heads: int) -> tuple[range, range]:
        """This rank's query heads and the key/value heads they share; ranks share a head when there are fewer heads.

        Raises UserError, naming the world sizes that work, when heads do not divide."""
        works = self.worlds(n_head, n_local_heads)
        if self.world not in works:
            raise UserError(
                f"world size {self.world} does not divide {n_head} query and {n_local_heads} key/value heads; "
                f"world sizes that work: {', '.join(map(str, works))}"
            )
        n, first = max(1, n_local_heads // self.world), self.rank * n_local_heads // self.world
        return self.part(n_head, 1), range(first, first + n)

    def share(self, value):
        """Rank 0's value on every rank. The others wait for it."""
        values = [value]
        if self.world > 1:
            dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]


def cut(t: Tensor, dim: int, *parts: range) -> Tensor:
    """These parts of t along dim (0 or 1), contiguous, with zeros where the last reaches past the end."""
    pieces = [t[part.start : part.stop] if dim == 0 else t[:, part.start : part.stop] for part in parts]
    whole = torch.cat(pieces, dim) if len(pieces) > 1 else pieces[0]  # one piece of a mapped file needs no copy
    missing = sum(map(len, parts)) - whole.shape[dim]
    return F.pad(whole, (0, 0) * (t.ndim - 1 - dim) + (0, missing)) if missing else whole.contiguous()
