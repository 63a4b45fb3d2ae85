import pytest
import torch

import ops
from errors import UserError
from gptq import Hessian, gptq
from linear import quantizer


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


def dense(tensors: dict[str, torch.Tensor], K: int) -> torch.Tensor:
    return ops.dequantize(tensors["weight"], tensors["scales"], tensors.get("zeros"), torch.float64)[:, :K]


def rounding(grid, mode, K):
    """What rounds float64 values of column k to the grid that tensors have."""
    scales, zeros = (t.double() for t in (grid["scales"], grid.get("zeros", torch.zeros(()))))
    if mode.startswith("int4"):
        scales, zeros = (t.repeat_interleave(int(mode[5:]), 1)[:, :K] for t in (scales, zeros))
        return lambda v, k: ((v - zeros[:, k]) / scales[:, k]).round().clamp(-8, 7) * scales[:, k] + zeros[:, k]
    if mode == "int8":
        return lambda v, k: (v / scales).round().clamp(-127, 127) * scales
    return lambda v, k: (v / scales).clamp(-448, 448).float().to(torch.float8_e4m3fn).double() * scales


def naive(weight, hessian, mode, grid, percdamp=0.01, order=None):
    """Optimal brain quantisation a column at a time, in float64, downdating the inverse: no Cholesky, no blocks. On the
    grid of tensors, columns in the order of their inputs' power, or as they are told. The weight it makes."""
    w, h = weight.double().clone(), hessian.double().clone()
    K, nearest = w.shape[1], rounding(grid, mode, w.shape[1])
    h.diagonal()[h.diagonal() == 0] = 1
    live = hessian.diagonal() > 0
    h += percdamp * hessian.double().diagonal()[live].mean() * torch.eye(K)
    inverse, out = torch.linalg.inv(h), torch.empty_like(w)
    left = order or hessian.diagonal().argsort(descending=True, stable=True).tolist()
    while left:
        k = left.pop(0)
        out[:, k] = nearest(w[:, k], k)
        error = (w[:, k] - out[:, k]) / inverse[k, k]
        w[:, left] -= error[:, None] * inverse[k, left]
        inverse = inverse - torch.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    return out


@pytest.mark.parametrize("mode", ["int4:32", "int4:64", "int4:128", "int8", "fp8"])
@pytest.mark.parametrize("blocksize", [1, 48, 128, 1000])  # blocks within groups, across and beyond them
def test_agrees_with_a_naive_float64_reference(mode, blocksize):
    weight, _, hessian = problem(24, 128)
    ours, nearest = gptq(weight, hessian, mode, blocksize=blocksize), quantizer(mode)(weight)
    assert {key: (t.dtype, t.shape) for key, t in ours.items()} == {k: (t.dtype, t.shape) for k, t in nearest.items()}
    assert mode.startswith("int4") or torch.equal(ours["scales"], nearest["scales"])
    expected, got = naive(weight, hessian, mode, ours), dense(ours, 128)
    assert ((got - expected).abs() > 1e-6).float().mean() < 0.004  # a tie may fall either way in fp32


def output_error(weight, x, tensors):
    return ((dense(tensors, weight.shape[1]) - weight.double()) @ x.double().t()).square().sum().item()


@pytest.mark.parametrize("mode,mse", [("int4", False), ("int4", True), ("int8", True), ("fp8", True)])
@pytest.mark.parametrize("group,K", [(32, 128), (128, 192), (256, 100)])
def test_output_error_is_far_below_rounding(group, K, mode, mse):
    weight, x, hessian = problem(32, K)
    mode = f"int4:{group}" if mode == "int4" else mode
    rounded = output_error(weight, x, quantizer(mode)(weight))
    assert output_error(weight, x, gptq(weight, hessian, mode, mse=mse)) < 0.5 * rounded


@pytest.mark.parametrize("group", [32, 128])
def test_the_range_search_loses_less(group):
    """Where a few weights are large, as in models."""
    weight, x, hessian = problem(64, 256)
    weight = weight**3 / weight.square().mean()
    modes = (gptq(weight, hessian, f"int4:{group}", mse=mse) for mse in (True, False))
    searched, spanned = (output_error(weight, x, tensors) for tensors in modes)
    assert searched < spanned


@pytest.mark.parametrize("mode", ["int4:32", "fp8"])
def test_the_order_of_power_loses_less(mode):
    """Against the same algorithm, grids and all, in the columns' own order, the strongest inputs coming last."""
    weight, x, _ = problem(64, 128)
    x = x.flip(1)
    hessian = Hessian(128)
    hessian.add(x)
    ordered = output_error(weight, x, gptq(weight, hessian.mean, mode, mse=False))
    unordered = naive(weight, hessian.mean, mode, gptq(weight, hessian.mean, mode, mse=False), order=[*range(128)])
    unordered = (unordered - weight.double()) @ x.double().t()
    assert ordered < 0.9 * unordered.square().sum().item()


def test_an_aim_makes_good_what_the_inputs_have_lost(monkeypatch):
    """x is what is left of the exact inputs: the outputs come nearer to what the exact ones make."""
    weight, exact, _ = problem(32, 64)
    generator = torch.Generator().manual_seed(3)
    x = exact + 0.3 * exact[:, torch.randperm(64, generator=generator)]
    hessian = Hessian(64, outputs=32)
    for part in (slice(100), slice(100, None)):
        hessian.add(x[part], exact[part] @ weight.t())
    wanted = exact.double() @ weight.double().t()

    def lost(aim, mode="int4:32"):
        return (x.double() @ dense(gptq(weight, hessian.mean, mode, aim=aim), 64).t() - wanted).square().sum().item()

    half, none = lost(hessian.products), lost(None)
    assert half < 0.6 * none
    monkeypatch.setattr("gptq.SHARE", 1.0)
    assert lost(hessian.products) < half
    # All the way it is the least squares' solution, but for rounding to 8 bits.
    damped = hessian.mean.double() + 0.01 * hessian.mean.double().diagonal().mean() * torch.eye(64)
    shift = torch.linalg.solve(damped, hessian.products.double() - weight.double() @ hessian.mean.double(), left=False)
    best = weight.double() + shift
    found = dense(gptq(weight, hessian.mean, "int8", aim=hessian.products), 64)
    errors = [((w - best) @ x.double().t()).square().sum().item() for w in (found, weight.double())]
    assert errors[0] < 1e-3 * errors[1]


def test_a_hessian_without_correlation_gives_round_to_nearest():
    weight, _, _ = problem(16, 128)
    for mode in ("int4:32", "fp8"):
        ours = gptq(weight, torch.eye(128), mode)
        nearest = rounding(ours, mode, 128)
        expected = torch.stack([nearest(weight[:, k].double(), k) for k in range(128)], 1)
        assert torch.equal(dense(ours, 128), expected), mode


def test_dead_columns_round_to_nearest_and_disturb_nothing():
    weight, x, _ = problem(16, 96)
    x[:, 5] = x[:, 40] = 0
    hessian = Hessian(96)
    hessian.add(x)
    ours = gptq(weight, hessian.mean, "int4:32")
    nearest = rounding(ours, "int4:32", 96)
    for k in (5, 40):
        assert torch.equal(dense(ours, 96)[:, k], nearest(weight[:, k].double(), k))
    assert ((dense(ours, 96) - naive(weight, hessian.mean, "int4:32", ours)).abs() > 1e-6).float().mean() < 0.004


def test_int4s_grid_is_that_of_gptqs_files():
    """A zero is a whole number of steps, 7 at most, exactly, whatever the signs of a group's weights."""
    weight, _, hessian = problem(64, 256)
    for shift in (0.0, 0.2, -0.2):
        own = gptq(weight + shift, hessian, "int4:64")
        points = own["zeros"].double() / own["scales"].double()
        assert torch.equal(points, points.round()) and points.abs().max() <= 7
        assert (dense(own, 256) - weight - shift).abs().max() < 8 * own["scales"].max()
    span = weight.unflatten(1, (-1, 64)).amax(2) - weight.unflatten(1, (-1, 64)).amin(2)
    whole = gptq(weight, hessian, "int4:64", mse=False)["scales"]
    torch.testing.assert_close(whole.float(), span / 15, rtol=1 / 32, atol=0)


def test_padding_and_shapes():
    weight, _, hessian = problem(8, 100)
    own = gptq(weight, hessian, "int4:64")
    assert {key: t.shape for key, t in own.items()} == {"weight": (8, 64), "scales": (8, 2), "zeros": (8, 2)}


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
    u = ops.inverse_factor(hessian, 0.01).double()
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(64)
    assert torch.equal(u, u.triu())
    torch.testing.assert_close(u.t() @ u @ damped, torch.eye(64).double(), rtol=0, atol=1e-4)


def test_fewer_tokens_than_features_need_no_luck():
    x = correlated(10, 64)
    hessian = Hessian(64)
    hessian.add(x)
    weight, _, _ = problem(8, 64)
    for percdamp in (0.01, 0.0):  # singular: the damping grows until a factor exists
        assert dense(gptq(weight, hessian.mean, "int4:32", percdamp=percdamp), 64).isfinite().all()
    gptq(weight, torch.zeros(64, 64), "int4:32")


def test_activations_that_are_not_finite_are_an_error():
    weight, _, hessian = problem(4, 32)
    hessian[1, 1] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        gptq(weight, hessian, "int4:32")
