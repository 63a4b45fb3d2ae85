"""GPTQ (arXiv 2210.17323): quantise a weight so that the layer's output, not the weight itself, changes least.

Knows nothing of models: a Hessian and a weight go in, integers, scales and zeros on Int4Linear's grid come out.
"""

import torch
from torch import Tensor

from errors import UserError
from linear import Int4Linear


class Hessian:
    """The Hessian of a linear layer's squared output error, 2 x x^T averaged over the tokens seen: fp32 (K, K)."""

    def __init__(self, features: int, device: torch.device | str = "cpu"):
        self.mean = torch.zeros(features, features, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Take in the layer's inputs x (..., K) of any floating dtype."""
        x = x.reshape(-1, x.shape[-1]).to(self.mean.device, torch.float32)
        self.tokens += len(x)
        # A running mean, not a sum: the entries stay within fp32's comfort however many tokens come.
        self.mean.addmm_(x.t(), x, beta=1 - len(x) / self.tokens, alpha=2 / self.tokens)


@torch.no_grad()
def gptq(
    weight: Tensor,
    hessian: Tensor,
    group: int,
    *,
    percdamp: float = 0.01,
    blocksize: int = 128,
    mse: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise weight (N, K) to 4 bits in groups along K, in fp32 on its device; hessian (K, K) is Hessian.mean.

    percdamp: dampening, as a share of the Hessian's mean diagonal; blocksize: columns between two updates of the rest;
    mse: search each group's range for the least loss, instead of spanning its weights.
    Returns q uint8 (N, K'), scales and zeros fp32 (N, K'/group) that bf16 holds exactly; K' is K padded to the group.
    """
    # (K, N): a column of the weight is contiguous
    w = weight.t().to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    K, N = w.shape
    if not hessian.isfinite().all():
        raise UserError("the calibration activations are not finite")
    u = inverse_factor(hessian.to(w.device, torch.float32), percdamp)  # (K, K)
    importance = u.diagonal() ** -2  # the loss of an error in column k is importance[k] * error^2 / 2
    groups = -(-K // group)
    q = torch.full((groups * group, N), 8, dtype=torch.uint8, device=w.device)
    scales, zeros = torch.ones(2, groups, N, device=w.device)
    for start in range(0, K, blocksize):
        stop = min(start + blocksize, K)
        errors = torch.zeros(stop - start, N, device=w.device)
        for k in range(start, stop):
            if k % group == 0:
                g, end = k // group, min(k + group, K)
                # Where the group reaches past the block, this block's errors have not arrived yet.
                late = w[stop:end] - u[start:k, stop:end].t() @ errors[: k - start]
                scales[g], zeros[g] = _grid(torch.cat((w[k : min(stop, end)], late)), importance[k:end], mse)
            rounded = Int4Linear.round(w[k], scales[g], zeros[g])
            q[k] = rounded.to(torch.uint8)
            error = (w[k] - ((rounded - 8) * scales[g] + zeros[g])) / u[k, k]
            w[k + 1 : stop].addr_(u[k, k + 1 : stop], error, alpha=-1)
            errors[k - start] = error
        w[stop:].addmm_(u[start:stop, stop:].t(), errors, alpha=-1)
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


def _grid(columns: Tensor, importance: Tensor, mse: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero (N,) for columns (G, N) of a group, by range or (mse) by the least weighted squared error."""
    groups = columns.t()
    scales, zeros = Int4Linear.grid(groups)
    if not mse:
        return scales[:, 0], zeros[:, 0]
    best = torch.full_like(scales, float("inf"))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    for shrink in torch.linspace(1, 0.6, 21).tolist():
        s, z = Int4Linear.grid(torch.cat((low, high), -1) * shrink)
        error = (Int4Linear.round(groups, s, z) - 8) * s + z - groups
        loss = (error.square() * importance).sum(-1, keepdim=True)
        scales, zeros = torch.where(loss < best, s, scales), torch.where(loss < best, z, zeros)
        best = torch.minimum(best, loss)
    return scales[:, 0], zeros[:, 0]
