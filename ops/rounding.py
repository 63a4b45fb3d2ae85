"""Rounding with error feedback, the inner loop of GPTQ (arXiv 2210.17323): columns one after the other, each moving
those after it by its error. What an error moves (`inverse_factor`), the grid (`int4_grid`), and the loop.

K columns of a weight (N, ...) lie as rows here, so that each is contiguous.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from ops.graph import capture

SHRINKS = 21  # ranges that the search tries for a group: from the whole span of its weights down to 0.6 of it
CHUNK = 1 << 25  # elements of a tensor that the search works on
LEVELS = {torch.uint8: (-8, 7), torch.int8: (-127, 127), torch.float8_e4m3fn: (-448, 448)}  # the ends of each grid


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


def round_columns(w: Tensor, scales: Tensor, zeros: Tensor, feedback: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """w, scales and zeros fp32 (K, N); feedback fp32 (K, K), whose row k says what an error of 1 in column k takes from
    the columns after it. dtype: that of the grid: uint8 (int4), int8 or float8_e4m3fn.

    Returns levels, so that w is about levels * scales + zeros, and what is left of each column as it was rounded:
    fp32 (K, N), valid until the next call.
    """
    return _runner(*w.shape, dtype, w.device)(w, scales, zeros, feedback)


@lru_cache(maxsize=16)  # a model has no more shapes
def _runner(K: int, N: int, dtype: torch.dtype, device: torch.device) -> Callable[..., tuple[Tensor, Tensor]]:
    levels, errors, columns = torch.zeros(3, K, N, device=device)
    low, high = LEVELS[dtype]

    def run(w: Tensor, scales: Tensor, zeros: Tensor, feedback: Tensor) -> tuple[Tensor, Tensor]:
        columns.copy_(w)
        for k in range(K):
            torch.sub(columns[k], zeros[k], out=levels[k]).div_(scales[k]).clamp_(low, high)
            levels[k].copy_(levels[k].to(dtype)) if dtype is torch.float8_e4m3fn else levels[k].round_()
            torch.addcmul(zeros[k], levels[k], scales[k], out=errors[k])
            torch.sub(columns[k], errors[k], out=errors[k])
            columns[k + 1 :].addr_(feedback[k, k + 1 :], errors[k], alpha=-1)
        return levels, errors

    if device.type == "cuda":  # where each of these kernels takes less time than launching it
        with torch.cuda.device(device):
            fixed = torch.zeros(K, N, device=device), torch.ones(K, N, device=device), torch.zeros(K, N, device=device)
            return capture(run, *fixed, torch.zeros(K, K, device=device))
    return run


def int4_grid(columns: Tensor, importance: Tensor, search: bool) -> tuple[Tensor, Tensor]:
    """Scales and zeros fp32 (N,) for columns (G, N) of a group: those that span them, or of several narrower ranges as
    well those that have the least squared error, weighted by importance (G,).

    As in GPTQ's files 0 is on the grid, from its second level to its last; scales have 5 significant bits, so that bf16
    holds their multiples, the zeros, too.
    """
    shrinks, best = torch.linspace(1, 0.6, SHRINKS, device=columns.device)[: None if search else 1, None, None], []
    low, high = LEVELS[torch.uint8]
    for part in columns.split(max(1, CHUNK // (len(shrinks) * len(columns))), 1):
        groups = part.t().contiguous()  # (n, G)
        start, end = (end[:, None] * shrinks for end in groups.aminmax(dim=1))  # (candidates, n, 1)
        start, end = start.clamp(max=0), end.clamp(min=0)
        mantissas, exponents = torch.frexp(((end - start) / 15).clamp(min=1e-6))
        scales = torch.ldexp((32 * mantissas).round() / 32, exponents)
        zeros = ((start / scales).round().clamp(-15, -1) - low) * scales
        levels = ((groups - zeros) / scales).round().clamp(low, high)  # (candidates, n, G)
        index = ((levels * scales + zeros - groups).square() @ importance).argmin(0)[None, :, None]
        best.append(torch.cat((scales, zeros), 2).take_along_dim(index, 0)[0])
    return torch.cat(best).unbind(1)
