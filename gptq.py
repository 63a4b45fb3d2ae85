"""GPTQ (arXiv 2210.17323): quantise a weight so that the layer's output, not the weight itself, changes least.

Knows nothing of models: a Hessian and a weight go in, linear.py's tensors come out. Three things are not the paper's:
columns are taken in the order of their inputs' power, on grids that are fixed before (AutoGPTQ's static groups, so that
no file needs to know the order); each grid is searched; and a weight is at first moved towards what undoes the error of
the layers before it (`aim`, see GPTAQ, arXiv 2504.02692, whose objective this is).
"""

import torch
from torch import Tensor

import ops
from errors import UserError
from linear import Int4, quantize_linear

CHUNK = 4096  # rows of a weight that are moved at a time: copies of a large output would not fit
SHARE = 0.5  # of the way towards the aim: all of it fits the calibration text


class Hessian:
    """The Hessian of a linear layer's squared output error, 2 x x^T averaged over the tokens seen: fp32 (K, K).

    outputs: also average 2 y x^T (outputs, K), y being what belongs to x.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu", outputs: int = 0):
        self.mean = torch.zeros(features, features, device=device)
        self.products = torch.zeros(outputs, features, device=device) if outputs else None
        self.tokens = 0

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """Take in the layer's inputs x (..., K), and y (..., outputs), of any floating dtype."""
        x = x.reshape(-1, x.shape[-1]).to(self.mean.device, torch.float32)
        if not len(x):  # an expert that no token is sent to
            return
        self.tokens += len(x)
        # A running mean, not a sum: the entries stay within fp32's comfort however many tokens come.
        how = {"beta": 1 - len(x) / self.tokens, "alpha": 2 / self.tokens}
        self.mean.addmm_(x.t(), x, **how)
        if self.products is not None:
            self.products.addmm_(y.reshape(len(x), -1).to(x).t(), x, **how)


@torch.no_grad()
def gptq(
    weight: Tensor,
    hessian: Tensor,
    mode: str,
    *,
    aim: Tensor | None = None,
    percdamp: float = 0.01,
    blocksize: int = 128,
    mse: bool = True,
) -> dict[str, Tensor]:
    """Quantise weight (N, K) to `mode` (linear.quantizer's), in fp32 on its device; hessian (K, K) is Hessian.mean.

    aim: 2 y x^T (N, K), averaged, of the outputs y that the layer should have; by default those it has. percdamp:
    dampening, as a share of the Hessian's mean diagonal; blocksize: columns between two updates of the rest; mse:
    search each int4 group's range for the least loss, instead of spanning its weights. Returns linear.py's tensors.
    """
    if not hessian.isfinite().all():
        raise UserError("the calibration activations are not finite")
    order = hessian.diagonal().argsort(descending=True, stable=True).to(weight.device)
    h = hessian.to(weight.device, torch.float32)[order][:, order]
    w = weight.t().float()[order]  # (K, N): a column of the weight is contiguous
    u = ops.inverse_factor(h, percdamp)  # (K, K)
    if aim is not None:  # a step of the least squares
        for part, goal in zip(w.split(CHUNK, 1), aim.split(CHUNK)):
            part += SHARE * (u.t() @ (u @ (goal.t().to(w)[order] - h @ part)))
    importance = u.diagonal() ** -2  # the loss of an error in column k is importance[k] * error^2 / 2
    u = u / u.diagonal()[:, None]  # row k: what an error of 1 in column k takes from the columns after it
    back = order.argsort()
    straight = w[back]
    nearest = quantize_linear(mode, {"weight": straight.t()}, "weight")  # its layout stays, and in 8 bits its scales
    dtype, scales = nearest["weight"].dtype, nearest["scales"].t().float()
    if dtype is torch.uint8:
        group = 2 * nearest["weight"].shape[1] // len(scales)
        groups = zip(straight.split(group), importance[back].split(group))
        scales, zeros = map(torch.stack, zip(*(ops.int4_grid(*own, mse) for own in groups)))  # (groups, N)
    else:
        group, scales = len(w), scales[None]
        zeros = torch.zeros_like(scales)
    del straight
    stored = torch.int8 if dtype is torch.uint8 else dtype
    q = torch.zeros(max(len(w), len(scales) * group), w.shape[1], dtype=torch.uint8, device=w.device)
    for start in range(0, len(w), blocksize):
        block, after = slice(start, start + blocksize), slice(start + blocksize, None)
        of = order[block] // group
        levels, errors = ops.round_columns(w[block], scales[of], zeros[of], u[block, block], dtype)
        q[order[block]] = levels.to(stored).view(torch.uint8)
        w[after].addmm_(u[block, after].t(), errors, alpha=-1)
    q = q.view(stored).t()
    if dtype is torch.uint8:
        return Int4.tensors(q + 8, scales.t(), zeros.t())
    return {"weight": q.contiguous(), "scales": nearest["scales"]}
