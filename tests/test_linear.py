import ctypes

import pytest
import torch
import torch.nn.functional as F

from errors import UserError
from linear import (
    FP8,
    GROUPS,
    Int4,
    Int8,
    Linear,
    Plain,
    interleaved,
    quantize_linear,
    quantizer,
)
from model import RMSNorm
from ops.linear_triton import L2_FETCH_GRANULARITY

KINDS = ["int8", "fp8", *(f"int4:{G}" for G in GROUPS)]
SIZES = [(96, 256), (48, 576), (33, 65), (7, 31), (1, 1), (16, 40)]  # (N, K)


def make(mode: str, N: int, K: int, seed: int = 0) -> tuple[torch.Tensor, Linear]:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) * 0.05
    tensors = {"weight": weight}
    return weight, Linear(K, N).assign(tensors if mode == "plain" else quantize_linear(mode, tensors, "w"))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("N,K", SIZES)
@pytest.mark.parametrize("mode", KINDS)
def test_round_trip_is_within_half_a_step(mode, N, K):
    weight, layer = make(mode, N, K)
    error = (layer.dequantized(torch.float32) - weight).abs()
    if mode == "int8":
        step = (weight.abs().amax(1, keepdim=True) / 127).expand_as(weight) * (1 + 2**-8)  # scales are rounded to bf16
        slack = torch.zeros(())
    elif mode == "fp8":
        exponent = torch.floor(torch.log2(weight.abs() / (weight.abs().amax(1, keepdim=True) / 448)))
        step = 2.0 ** (exponent.clamp(min=-6) - 3) * weight.abs().amax(1, keepdim=True) / 448
        slack = 2**-7 * weight.abs()
    else:
        G = int(mode[5:])
        groups = F.pad(weight[None], (0, -K % G), mode="replicate")[0].unflatten(1, (-1, G))
        low, high = groups.aminmax(dim=-1, keepdim=True)
        step = ((high - low) / 15).expand_as(groups).flatten(1)[:, :K]
        slack = (2**-7 * torch.maximum(low.abs(), high.abs()) + 1e-5).expand_as(groups).flatten(1)[:, :K]
    assert (error <= step / 2 + slack).all()


@pytest.mark.parametrize("N,K", SIZES)
@pytest.mark.parametrize("mode", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matmul_is_dequantise_then_matmul(mode, dtype, N, K):
    _, layer = make(mode, N, K)
    plain = layer.dequantized(torch.float64)
    for packed in (False, True):
        if packed:
            layer.pack(dtype)
        assert relative(layer.dequantized(torch.float32), plain) < (4e-3 if dtype is torch.bfloat16 else 1e-6)
        for rows in (1, 2, 7, 16, 17, 64):
            x = torch.randn(2, rows, K, generator=torch.Generator().manual_seed(rows)).to(dtype)[:1]
            y = layer(x)
            assert y.shape == (1, rows, N) and y.dtype is dtype
            assert relative(y, x.double() @ plain.t()) < (1e-2 if dtype is torch.bfloat16 else 1e-5), (packed, rows)


@pytest.mark.parametrize("mode", KINDS)
def test_fp16_holds_what_small_scales_make(mode):
    weight = torch.randn(8, 64) * 1e-3
    layer = Linear(64, 8).assign(quantizer(mode)(weight))
    assert relative(layer.dequantized(torch.float16), layer.dequantized(torch.float64)) < 2e-3
    assert layer.dequantized(torch.float16).dtype is torch.float16


@pytest.mark.parametrize("mode", ["int8", "int4:32"])
def test_fast_cpu_operators_are_used_in_bf16(mode, monkeypatch):
    _, layer = make(mode, 32, 64)
    layer.pack(torch.bfloat16)
    monkeypatch.setattr(F, "linear", None)  # the slow path would fail
    assert layer(torch.ones(3, 64, dtype=torch.bfloat16)).shape == (3, 32)


def test_norm_bias_and_residual_agree_with_the_plain_layer():
    _, layer = make("int8", 24, 64)
    layer.bias = torch.nn.Parameter(torch.randn(24))
    norm = RMSNorm(64, 1e-5)
    norm.weight.data.uniform_(0.5, 2)
    x, residual = torch.randn(2, 3, 64), torch.randn(2, 3, 24)
    expected = residual + F.linear(norm(x), layer.dequantized(torch.float32), layer.bias)
    torch.testing.assert_close(layer(x, norm, residual), expected)


@pytest.mark.parametrize("mode", ["plain", *KINDS])
def test_interleaved_layers_make_swiglu(mode):
    gate, up = (make(mode, 24, 64, seed=seed)[1] for seed in (1, 2))
    for layer in (gate, up):
        layer.bias = torch.nn.Parameter(torch.randn(24))
    x = torch.randn(2, 3, 64)
    both = interleaved(gate, up)
    assert both.kind is gate.kind and both.out_features == 48
    torch.testing.assert_close(both(x), F.silu(gate(x)) * up(x))


def test_layers_of_two_kinds_stay_apart():
    assert interleaved(make("int8", 24, 64)[1], make("int4:32", 24, 64)[1]) is None
    assert interleaved(make("int4:64", 24, 64)[1], make("int4:32", 24, 64)[1]) is None
    assert interleaved(make("int8", 20, 64)[1], make("int8", 20, 64)[1]) is None  # rows are not by 8


def gpt_fast_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """dynamically_quantize_per_channel of gpt-fast, as its README and file describe it: asymmetric bounds -128..127."""
    low, high = weight.aminmax(dim=1)
    reach = torch.max(-torch.min(low, torch.zeros_like(low)), torch.max(high, torch.zeros_like(high)))
    scales = torch.clamp(reach / (float(127 - -128) / 2), min=torch.finfo(torch.float32).eps)
    return torch.clamp(torch.round(weight / scales.unsqueeze(-1)), -128, 127).to(torch.int8), scales.to(torch.bfloat16)


def test_int8_format_is_gpt_fasts():
    weight = torch.randn(40, 100)
    weight[3] = 0
    theirs = dict(zip(("weight", "scales"), gpt_fast_int8(weight)))
    ours = Int8.quantize(weight)
    assert [(key, t.dtype, t.shape) for key, t in ours.items()] == [
        (key, t.dtype, t.shape) for key, t in theirs.items()
    ]
    layers = [Linear(100, 40).assign(tensors) for tensors in (ours, theirs)]
    assert all(layer.kind is Int8 for layer in layers)
    errors = [(layer.dequantized(torch.float32) - weight).abs().max() for layer in layers]
    assert errors[0] < errors[1] < 0.05  # 127.5 clips the largest weights


def test_int4_layout_on_disk():
    q = torch.arange(16).repeat(2, 4)[:, :64]
    tensors = Int4.tensors(q, torch.full((2, 2), 0.5), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert tensors["weight"].dtype is torch.uint8 and tensors["weight"].shape == (2, 32)
    assert tensors["weight"][0, 0] == 0 | 1 << 4 and tensors["weight"][0, 1] == 2 | 3 << 4
    w = Linear(64, 2).assign(tensors).dequantized(torch.float32)
    expected = (q - 8) * 0.5 + torch.tensor([[1.0, 2.0], [3.0, 4.0]]).repeat_interleave(32, 1)
    assert torch.equal(w, expected)


def test_padding_widens_no_range():
    weight = torch.rand(4, 40) + 5  # zeros as padding would stretch the second group of 32 from 1 to 6
    layer = Linear(40, 4).assign(Int4.quantize(weight, 32))
    assert (layer.dequantized(torch.float32) - weight).abs().max() < 0.07


def test_constant_rows_and_groups():
    weight = torch.full((2, 64), 0.25)
    weight[1] = 0
    for mode in KINDS:
        layer = Linear(64, 2).assign(quantize_linear(mode, {"weight": weight}, "w"))
        torch.testing.assert_close(layer.dequantized(torch.float32), weight, rtol=4e-3, atol=1e-5)


def test_quantising_rows_apart_is_quantising_them_together():
    weight = torch.randn(10, 96)
    for mode in KINDS:
        whole, parts = quantizer(mode)(weight), [quantizer(mode)(part) for part in weight.split(3)]
        for key, tensor in whole.items():
            assert torch.equal(tensor.float(), torch.cat([part[key].float() for part in parts]))


@pytest.mark.parametrize(
    "mode,said", [("int5", "int5"), ("int4:33", "int4:33"), ("int8:32", "int8:32"), ("", "accepted")]
)
def test_unknown_modes_are_named(mode, said):
    with pytest.raises(UserError, match=said):
        quantizer(mode)


def test_weights_that_cannot_be_quantised_are_named():
    weight = torch.ones(2, 32)
    with pytest.raises(UserError, match=r"layers\.0\.wo is quantised already"):
        quantize_linear("int8", Int8.quantize(weight), "layers.0.wo")
    with pytest.raises(UserError, match=r"layers\.0\.wo has no weight"):
        quantize_linear("int8", {}, "layers.0.wo")
    weight[1, 1] = float("nan")
    with pytest.raises(UserError, match=r"layers\.0\.wo holds NaN"):
        quantize_linear("int8", {"weight": weight}, "layers.0.wo")


def test_kind_is_told_from_tensors():
    weight = torch.randn(32, 64)
    for mode, kind in (("int8", Int8), ("fp8", FP8), ("int4", Int4), ("int4:256", Int4)):
        assert Linear(64, 32).assign(quantizer(mode)(weight)).kind is kind
    plain = Linear(64, 32).assign({"weight": weight.bfloat16(), "bias": torch.zeros(32)})
    assert plain.kind is Plain and plain.bias is not None


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"weight": torch.zeros(32, 63)},
        {"weight": torch.zeros(32, 64), "bias": torch.zeros(64)},
        {"weight": torch.zeros(32, 64, dtype=torch.int8)},
        {"weight": torch.zeros(32, 64, dtype=torch.int8), "scales": torch.zeros(64)},
        {"weight": torch.zeros(32, 32, dtype=torch.uint8), "scales": torch.zeros(32, 2)},
        {"weight": torch.zeros(32, 32, dtype=torch.uint8), "scales": torch.zeros(32, 3), "zeros": torch.zeros(32, 3)},
        {"weight": torch.zeros(32, 64, dtype=torch.int64)},
    ],
)
def test_tensors_of_no_layer_are_an_error(tensors):
    with pytest.raises(UserError, match=r"layers\.1\.wo needs .*\[32, 64\]; found"):
        Linear(64, 32).assign(tensors, "layers.1.wo")


@pytest.mark.cuda
@pytest.mark.parametrize("N,K", [(96, 256), (48, 576), (512, 4096), (33, 96)])
@pytest.mark.parametrize("mode", KINDS)
def test_matmul_on_cuda(mode, N, K):
    _, layer = make(mode, N, K)
    plain = layer.dequantized(torch.float64)
    layer.cuda().pack(torch.bfloat16)
    assert relative(layer.dequantized(torch.float32).cpu(), plain) < 4e-3
    for rows in (1, 2, 7, 8, 16, 17, 64):
        x = torch.randn(1, rows, K, dtype=torch.bfloat16)
        assert relative(layer(x.cuda()).cpu(), x.double() @ plain.t()) < 1e-2, rows


@pytest.mark.cuda
def test_what_misses_l2_brings_a_line_once_a_layer_is_packed():
    make("int8", 96, 256)[1].cuda().pack(torch.bfloat16)
    found = ctypes.c_size_t()
    ctypes.CDLL("libcuda.so.1").cuCtxGetLimit(ctypes.byref(found), L2_FETCH_GRANULARITY)
    assert found.value == 128
