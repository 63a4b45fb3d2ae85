import pytest
import torch

from errors import UserError
from gptq import Hessian, gptq, inverse_factor
from linear import Int4, Linear


def correlated(tokens: int, features: int, seed: int = 0) -> torch.Tensor:
    """Inputs whose features share a few strong directions, as activations do."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=g) * torch.logspace(0, -2, features)[:, None] / features**0.5
    return torch.randn(tokens, features, generator=g) @ mix + 0.02 * torch.randn(tokens, features, generator=g)


def problem(N: int, K: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = correlated(512, K)
    hessian = Hessian(K)
    hessian.add(x)
    return torch.randn(N, K, generator=torch.Generator().manual_seed(1)) * 0.05, x, hessian.mean


def dequantise(q, scales, zeros, K):
    groups = q.double().unflatten(1, (scales.shape[1], -1)) - 8
    return (groups * scales.double()[..., None] + zeros.double()[..., None]).flatten(1)[:, :K]


def naive(weight, hessian, group, percdamp=0.01):
    """Optimal brain quantisation a column at a time, in float64, downdating the inverse: no Cholesky, no blocks."""
    w, h = weight.double().clone(), hessian.double().clone()
    K = w.shape[1]
    h.diagonal()[h.diagonal() == 0] = 1
    live = hessian.diagonal() > 0
    h += percdamp * hessian.double().diagonal()[live].mean() * torch.eye(K)
    inverse = torch.linalg.inv(h)
    codes = torch.empty_like(w)
    grids = []
    for k in range(K):
        if k % group == 0:
            low, high = w[:, k : k + group].float().aminmax(dim=1)
            step = ((high - low) / 15).clamp(min=1e-6)
            grids.append((step.bfloat16().double(), (low + 8 * step).bfloat16().double()))
        scale, zero = grids[-1]
        codes[:, k] = (((w[:, k] - zero) / scale).round() + 8).clamp(0, 15)
        error = (w[:, k] - ((codes[:, k] - 8) * scale + zero)) / inverse[k, k]
        w[:, k + 1 :] -= error[:, None] * inverse[k, k + 1 :]
        inverse = inverse - torch.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    return codes, torch.stack([s for s, _ in grids], 1), torch.stack([z for _, z in grids], 1)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("blocksize", [1, 16, 48, 128, 1000])  # groups inside, across and beyond blocks
def test_agrees_with_a_naive_float64_reference(group, blocksize):
    weight, _, hessian = problem(24, 128)
    q, scales, zeros = gptq(weight, hessian, group, blocksize=blocksize, mse=False)
    codes, scales64, zeros64 = naive(weight, hessian, group)
    assert q.dtype is torch.uint8 and q.max() <= 15
    assert (q != codes).float().mean() < 0.002  # a tie may fall either way in fp32
    torch.testing.assert_close(scales.double(), scales64, rtol=2**-7, atol=0)
    torch.testing.assert_close(zeros.double(), zeros64, rtol=2**-7, atol=1e-4)


def output_error(weight, x, q, scales, zeros):
    return ((dequantise(q, scales, zeros, weight.shape[1]) - weight.double()) @ x.double().t()).square().sum().item()


@pytest.mark.parametrize("options", [{"mse": False}, {"mse": True}])
@pytest.mark.parametrize("group,K", [(32, 128), (128, 192), (256, 100)])
def test_output_error_is_far_below_rounding(group, K, options):
    weight, x, hessian = problem(32, K)
    rtn = Int4.quantize(weight, group)
    layer = Linear(K, 32).assign(rtn)
    rounded = ((layer.dequantized(torch.float64) - weight.double()) @ x.double().t()).square().sum().item()
    assert output_error(weight, x, *gptq(weight, hessian, group, **options)) < 0.5 * rounded


@pytest.mark.parametrize("group", [32, 128])
def test_the_range_search_loses_less(group):
    weight, x, hessian = problem(64, 256)
    searched, spanned = (output_error(weight, x, *gptq(weight, hessian, group, mse=mse)) for mse in (True, False))
    assert searched < spanned


def test_a_hessian_without_correlation_gives_round_to_nearest():
    weight, _, _ = problem(16, 128)
    q, scales, zeros = gptq(weight, torch.eye(128), 32, mse=False)
    rtn = Int4.quantize(weight, 32)
    ours = Int4.tensors(q, scales, zeros)
    for key, tensor in rtn.items():
        assert torch.equal(ours[key], tensor), key


def test_dead_columns_round_to_nearest_and_disturb_nothing():
    weight, x, _ = problem(16, 96)
    x[:, 5] = x[:, 40] = 0
    hessian = Hessian(96)
    hessian.add(x)
    q, scales, zeros = gptq(weight, hessian.mean, 32, mse=False)
    w = dequantise(q, scales, zeros, 96)
    assert w.isfinite().all()
    for k in (5, 40):
        assert ((w[:, k] - weight[:, k]).abs() <= 0.51 * scales[:, k // 32] + 2e-3 * weight.abs().max()).all()
    codes, *_ = naive(weight, hessian.mean, 32)
    assert (q != codes).float().mean() < 0.002


def test_padding_and_shapes():
    weight, _, hessian = problem(8, 100)
    q, scales, zeros = gptq(weight, hessian, 64)
    assert q.shape == (8, 128) and scales.shape == zeros.shape == (8, 2)
    assert torch.equal(scales, scales.bfloat16().float()) and torch.equal(zeros, zeros.bfloat16().float())


def test_hessian_is_the_mean_of_2xxt_whatever_the_batches():
    x = correlated(300, 20)
    hessian = Hessian(20)
    for part in (x[:7], x[7:8].bfloat16().float(), x[8:].view(2, 146, 20)):
        hessian.add(part)
    x[7] = x[7].bfloat16().float()
    assert hessian.tokens == 300
    torch.testing.assert_close(hessian.mean.double(), 2 * x.double().t() @ x.double() / 300, rtol=1e-5, atol=1e-6)


def test_inverse_factor():
    _, _, hessian = problem(1, 64)
    u = inverse_factor(hessian, 0.01).double()
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(64)
    assert torch.equal(u, u.triu())
    torch.testing.assert_close(u.t() @ u @ damped, torch.eye(64).double(), rtol=0, atol=1e-4)


def test_fewer_tokens_than_features_need_no_luck():
    x = correlated(10, 64)
    hessian = Hessian(64)
    hessian.add(x)
    weight, _, _ = problem(8, 64)
    for percdamp in (0.01, 0.0):  # singular: the damping grows until a factor exists
        q, scales, zeros = gptq(weight, hessian.mean, 32, percdamp=percdamp)
        assert dequantise(q, scales, zeros, 64).isfinite().all()
    gptq(weight, torch.zeros(64, 64), 32)


def test_activations_that_are_not_finite_are_an_error():
    weight, _, hessian = problem(4, 32)
    hessian[1, 1] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        gptq(weight, hessian, 32)
