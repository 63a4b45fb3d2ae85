"""GPTQ (arXiv 2210.17323): quantise a weight so that the layer's output, not the weight itself, changes least.

Knows nothing of models: a Hessian and a weight go in, integers, scales and zeros on Int4's grid come out.
"""

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

import ops
from errors import UserError
from linear import Int4

SHRINKS = 21  # ranges that the search tries for a group: from the whole span of its weights down to 0.6 of it
CHUNK = 1 << 25  # elements of a tensor that the search works on


class Hessian:
    """The Hessian of a linear layer's squared output error, 2 x x^T averaged over the tokens seen: fp32 (K, K)."""

    def __init__(self, features: int, device: torch.device | str = "cpu"):
        self.mean = torch.zeros(features, features, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Take in the layer's inputs x (..., K) of any floating dtype."""
        x = x.reshape(-1, x.shape[-1]).to(self.mean.device, torch.float32)
        if not len(x):  # an expert that no token is sent to
            return
        self.tokens += len(x)
        # A running mean, not a sum: the entries stay within fp32's comfort however many tokens come.
        self.mean.addmm_(x.t(), x, beta=1 - len(x) / self.tokens, alpha=2 / self.tokens)


@torch.no_grad()
def gptq(
    weight: Tensor, hessian: Tensor, group: int, *, percdamp: float = 0.01, blocksize: int = 128, mse: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise weight (N, K) to 4 bits in groups along K, in fp32 on its device; hessian (K, K) is Hessian.mean.

    percdamp: dampening, as a share of the Hessian's mean diagonal; blocksize: columns, at most a group's, between two
    updates of the rest; mse: search each group's range for the least loss, instead of spanning its weights.
    Returns q uint8 (N, K'), scales and zeros fp32 (N, K'/group) that bf16 holds exactly; K' is K padded to the group.
    """
    if not hessian.isfinite().all():
        raise UserError("the calibration activations are not finite")
    # (K, N): a column of the weight is contiguous
    w = weight.t().to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    K, N = w.shape
    u = inverse_factor(hessian.to(w.device, torch.float32), percdamp)  # (K, K)
    importance = u.diagonal() ** -2  # the loss of an error in column k is importance[k] * error^2 / 2
    u = u / u.diagonal()[:, None]  # row k: what an error of 1 in column k takes from the columns after it
    groups = -(-K // group)
    q = torch.full((groups * group, N), 8, dtype=torch.uint8, device=w.device)
    scales, zeros = torch.ones(2, groups, N, device=w.device)
    for start, stop in pairwise(sorted({*range(0, K, group), *range(0, K, blocksize), K})):
        g = start // group
        if start % group == 0:
            whole = slice(start, start + group)
            scales[g], zeros[g] = _grid(w[whole], importance[whole], SHRINKS if mse else 1)
        columns = (w[start:stop] - zeros[g]) / scales[g] + 8
        q[start:stop], errors = _rounder(stop - start, N, w.device)(columns, u[start:stop, start:stop])
        w[stop:].addmm_(u[start:stop, stop:].t(), errors * scales[g], alpha=-1)
    return q.t().contiguous(), scales.t().contiguous(), zeros.t().contiguous()


def inverse_factor(hessian: Tensor, percdamp: float) -> Tensor:
    """The upper triangular U with U^T U = (H + damping)^-1, fp32 (K, K), whose row k says how the error of column k
    moves the columns after it. Inputs that never fire are left to round to nearest."""
    h = hessian.to(torch.float64 if hessian.is_cpu else torch.float32, copy=True)
    diagonal = h.diagonal()
    dead = diagonal <= 0
    diagonal[dead] = 1
    damp = percdamp * diagonal[~dead].mean().nan_to_num(1).item()
    while True:
        diagonal += damp
        # With J reversing the order, chol(J H J) = L makes R = J L J upper triangular and H = R R^T, so U = R^-1:
        # one factorisation where inverting H first would take two, and lose precision.
        factor, failed = torch.linalg.cholesky_ex(h.flip(0, 1))
        if not failed.item():
            eye = torch.eye(len(h), dtype=h.dtype, device=h.device)
            return torch.linalg.solve_triangular(factor.flip(0, 1), eye, upper=True).float()
        damp = max(10 * damp, 1e-6 * diagonal.mean().item())


def _grid(columns: Tensor, importance: Tensor, candidates: int) -> tuple[Tensor, ...]:
    """Scale and zero (N,) for columns (G, N) of a group: those of the candidate range, the whole one first, that has
    the least weighted squared error."""
    shrinks, best = torch.linspace(1, 0.6, candidates, device=columns.device)[:, None, None], []
    for part in columns.split(max(1, CHUNK // (candidates * len(columns))), 1):
        groups = part.t().contiguous()  # (n, G)
        scales, zeros = Int4.grid(torch.stack(groups.aminmax(dim=1), 1) * shrinks)  # (candidates, n, 1)
        error = (Int4.round(groups, scales, zeros) - 8) * scales + zeros - groups  # (candidates, n, G)
        index = (error.square() @ importance).argmin(0)[None, :, None]
        best.append(torch.cat((scales, zeros), 2).take_along_dim(index, 0)[0])
    return torch.cat(best).unbind(1)


@lru_cache(maxsize=8)  # a model has no more shapes
def _rounder(n: int, N: int, device: torch.device) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(columns (n, N) in units of the grid's step and from its start, u (n, n)) -> codes 0..15 and errors, fp32 (n, N),
    valid until the next call: rounds a column after the other, each moving those after it by its error and u. Columns
    are overwritten."""
    codes, errors = torch.zeros(2, n, N, device=device)

    def rounded(columns: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        for k in range(n):
            torch.round(columns[k], out=codes[k]).clamp_(0, 15)
            torch.sub(columns[k], codes[k], out=errors[k])
            columns[k + 1 :].addr_(u[k, k + 1 :], errors[k], alpha=-1)
        return codes, errors

    if device.type == "cuda":  # where each of these kernels takes less time than launching it
        with torch.cuda.device(device):
            return ops.capture(rounded, torch.zeros_like(codes), torch.zeros(n, n, device=device))
    return rounded
