"""The CPU's kernels against plain PyTorch in float64, and what happens where they cannot be compiled."""

import math

import pytest
import torch
from conftest import run_forked
from torch.nn.functional import linear

from linear import GROUPS, Linear, quantize_linear
from model import RMSNorm
from ops import cpu, kv_cache
from ops.attention import attention_plain
from ops.linear import swiglu

KINDS = ["plain", "int8", *(f"int4:{G}" for G in GROUPS)]
OTHERS = ["int4:32 fp16", "int4:128 fp16"]
OTHERS += ["int8 fp32", "int8:16 fp16", "int8:16 zeros", "int8:32", "int8:128 zeros fp16"]
# (N, K): whole blocks and parts of them, groups that reach past K
SIZES = [(48, 576), (33, 65), (7, 31), (1, 1), (16, 40), (17, 200), (96, 3072)]


@pytest.fixture(autouse=True, scope="module")
def compiled():
    assert cpu.ready()  # the README asks for a compiler; one that refuses cpu.cpp must not go unseen


def packed(kind: str, N: int, K: int, dtype: torch.dtype) -> tuple[Linear, torch.Tensor]:
    """A layer that the kernels support, and its weight in float64."""
    tensors = {"weight": torch.randn(N, K).to(dtype), "bias": torch.randn(N).to(dtype)}
    if kind in OTHERS:
        tensors |= other_programs(kind, N, K)
    elif kind != "plain":
        tensors = quantize_linear(kind, tensors, "w")
    layer = Linear(K, N).assign(tensors)
    weight = layer.dequantized(torch.float64)
    layer.pack(dtype)
    assert layer.backends[0].__name__ == "_cpu" and (layer.weight.dtype.itemsize == 1 or kind == "plain")
    torch.testing.assert_close(layer.dequantized(torch.float64), weight, rtol=0, atol=0)
    return layer, weight


def other_programs(kind: str, N: int, K: int) -> dict[str, torch.Tensor]:
    """A weight as formats/ has it. Its scales have both signs, and in fp16 some are subnormal."""
    bits, _, group = kind.split()[0].partition(":")
    group = int(group or 0)
    n, rounded = -(-K // group) if group else 1, torch.float16 if "fp16" in kind else torch.bfloat16
    scales = ((torch.rand(N, n) + 0.5) / (64 if bits == "int8" else 4)).to(rounded)
    scales.view(-1)[::5] *= 2**-14
    scales.view(-1)[::3] *= -1
    if not group:
        return {"weight": torch.randint(-128, 128, (N, K), dtype=torch.int8), "scales": torch.randn(N) / 64}
    zeros = {"zeros": torch.randn(N, n).to(rounded)} if "zeros" in kind or bits == "int4" else {}
    if bits == "int4":
        return {"weight": torch.randint(0, 256, (N, n * group // 2), dtype=torch.uint8), "scales": scales, **zeros}
    return {"weight": torch.randint(-128, 128, (N, K), dtype=torch.int8), "scales": scales, **zeros}


def relative(y: torch.Tensor, expected: torch.Tensor) -> float:
    return ((y.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("N,K", SIZES)
@pytest.mark.parametrize("kind", KINDS + OTHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_agrees_with_float64(kind, dtype, N, K):
    layer, weight = packed(kind, N, K, dtype)
    norm = RMSNorm(K, 1e-5)
    norm.weight.data = (torch.rand(K) + 0.5).to(dtype)
    for rows in (1, 2, 3, 5, 8, 15, 16, 37, 64, 200):
        x, residual = torch.randn(1, rows, K).to(dtype), torch.randn(1, rows, N).to(dtype)
        layer.fp32, layer.swiglu = True, False
        y = layer(x)
        assert y.shape == (1, rows, N) and y.dtype is torch.float32
        bound = 2e-6 if dtype is torch.float32 else 1e-4 if kind == "plain" else 2e-2  # int8 activations
        if kind == "plain" and rows > cpu.most_rows(dtype):
            bound = 4e-3  # PyTorch's, in bf16
        assert relative(y, linear(x.double(), weight, layer.bias.double())) < bound, rows
        normed = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.weight.double()
        expected = residual.double() + linear(normed, weight, layer.bias.double())
        if N % 16 == 0:
            layer.swiglu = True
            y = layer(x, norm, residual[..., : N // 2])
            own = residual[..., : N // 2].double() + swiglu(expected - residual.double())
            rounding = 2e-3 if dtype is torch.bfloat16 and rows >= 4 else 0  # of what was normalised, to bf16
            assert relative(y, own) < 4 * max(bound, rounding)  # a product of two; the gate's slope reaches 1.1
        layer.fp32 = layer.swiglu = False
        assert relative(layer(x, norm, residual), expected) < max(bound, 4e-3 if dtype is torch.bfloat16 else 0)


@pytest.mark.parametrize("kind", ["int8", "int4:32", "int4:128", "int8:16 zeros"])
def test_an_outlier_costs_its_neighbours_alone(kind):
    """Activations become integers with a scale for each 32: one of 10,000 times the others' size spoils 32 of them."""
    layer, weight = packed(kind, 64, 1024, torch.bfloat16)
    layer.bias, layer.fp32 = None, True
    x = torch.randn(2, 1024).bfloat16()
    x[:, 100] = 1e4
    weight[:, 64:128] = 0
    alone = torch.zeros_like(x)
    alone[:, 64:128] = x[:, 64:128]
    y = layer(x).double() - layer(alone)
    assert relative(y, linear(x.double(), weight)) < 1.5e-2  # one scale for all makes nothing of the others


@pytest.mark.parametrize("kind", KINDS + OTHERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(kind, value):
    layer, _ = packed(kind, 16, 192, torch.bfloat16)
    x = torch.randn(3, 192).bfloat16()
    x[1, 70] = value
    finite = layer(x).isfinite()
    assert finite[0].all() and finite[2].all() and not finite[1].any()


def test_columns_of_a_result_do_not_depend_on_the_threads():
    layer, _ = packed("int4:32", 1000, 192, torch.bfloat16)
    x = torch.randn(5, 192, dtype=torch.bfloat16)
    alone = layer(x)
    torch.set_num_threads(3)
    assert torch.equal(layer(x), alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "B,S,H,Hkv,D,T,window,rotary,norms",
    [
        (1, 1, 9, 3, 64, 50, 0, 64, False),
        (2, 3, 4, 2, 32, 20, 0, 32, True),
        (3, 8, 4, 1, 16, 19, 5, 8, True),
        (1, 1, 4, 4, 80, 300, 0, 0, False),
        (2, 16, 4, 2, 64, 17, 0, 64, False),
        (2, 64, 2, 1, 16, 70, 9, 16, False),
        (2, 65, 6, 2, 40, 200, 0, 40, True),
        (1, 150, 3, 1, 64, 300, 70, 32, False),
    ],
)
def test_attention_agrees_with_the_reference(B, S, H, Hkv, D, T, window, rotary, norms, dtype):
    qkv = torch.randn(B, S, (H + 2 * Hkv) * D).to(dtype)
    caches = [torch.randn(B, Hkv, T, D).to(dtype) for _ in range(2)]
    ours, plain = ([cache.clone() for cache in caches] for _ in range(2))
    pos = torch.tensor([T - 2, 2, 0][:B]) if S < 16 else torch.tensor([5, 0][:B])  # row 0 reaches past the cache
    angles = torch.rand(T, rotary // 2) * 6
    rope = torch.stack((angles.cos(), angles.sin()), -1) if rotary else None
    gains = [torch.rand(D).to(dtype) for _ in range(2)] if norms else [None, None]
    assert cpu.supports_attention(qkv, *ours, pos) == (cpu.most_rows(dtype) >= S)
    y = cpu.attention(qkv, *ours, pos, rope, *gains, 1e-5, H, window)
    expected = attention_plain(qkv, *plain, pos, rope, *gains, 1e-5, H, window)
    bound = 2e-6 if dtype is torch.float32 else 6e-3  # the reference rounds more often in bf16
    inside = (pos[:, None] + torch.arange(S) < T)[..., None]  # what lies past the cache may be anything, but finite
    assert y.isfinite().all()
    assert relative(y * inside, (expected * inside).double()) < bound
    for cache, other in zip(ours, plain):
        assert relative(cache, other.double()) < bound


@pytest.mark.parametrize("kind", kv_cache.DTYPES)
@pytest.mark.parametrize("dtype,bound", [(torch.float32, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(
    "B,S,H,Hkv,D,T,window,norms",
    [
        (1, 1, 9, 3, 64, 50, 0, False),
        (2, 1, 4, 2, 40, 300, 20, True),
        (2, 16, 4, 2, 64, 17, 0, False),
        (3, 8, 4, 1, 16, 19, 5, True),
        (1, 150, 3, 1, 80, 300, 70, False),
    ],
)
def test_attention_over_caches_in_8_bits(B, S, H, Hkv, D, T, window, norms, dtype, bound, kind):
    qkv = torch.randn(B, S, (H + 2 * Hkv) * D).to(dtype)
    pos = torch.tensor([T - S - 1, 2, 0][:B])
    cache = kv_cache.allocate((B, Hkv, T, D), dtype, kind, "cpu")
    for codes, scales in zip(cache[:2], cache[2:]):
        q, own = kv_cache.quantize(2 * torch.randn(B, Hkv, T, D), codes.dtype)
        codes.copy_(q), scales.fill_(math.nan)
        for b in range(B):  # what lies past a row's position is not read
            scales[b, :, : pos[b]] = own[b, :, : pos[b]]
    ours, plain = [t.clone() for t in cache], [t.nan_to_num() if t.dtype is torch.bfloat16 else t for t in cache]
    angles = torch.rand(T, D // 2) * 6
    rope = torch.stack((angles.cos(), angles.sin()), -1)
    gains = [torch.rand(D).to(dtype) for _ in range(2)] if norms else [None, None]
    most = cpu.most_rows(dtype)
    assert cpu.supports_attention(qkv, *ours[:2], pos) == (most >= S)
    y = cpu.attention(qkv, *ours[:2], pos, rope, *gains, 1e-5, H, window, *ours[2:])
    rest = (pos, rope, *gains, 1e-5, H, window, None, 0.0, None)
    expected = attention_plain(qkv, *plain[:2], *rest, *plain[2:])
    assert relative(y, expected.double()) < bound
    for part in (0, 1):  # in bf16 the reference rounds keys after RoPE; either may round to another side
        own, other = (
            kv_cache.dequantize(t[part], t[2 + part][:, :, :T].nan_to_num(), torch.float64) for t in (ours, plain)
        )
        assert relative(own, other) < bound
        written = (pos[:, None, None] <= torch.arange(T)) & (torch.arange(T) < pos[:, None, None] + S)
        assert torch.equal(ours[2 + part].isnan()[:, :, :T], cache[2 + part].isnan()[:, :, :T] & ~written)
        assert torch.equal(ours[2 + part][:, :, T:].isnan(), cache[2 + part][:, :, T:].isnan())


def test_values_in_8_bits_are_what_quantize_makes_of_them():
    """With every code of fp8, subnormal ones among them, and halves between codes."""
    for kind, dtype in kv_cache.DTYPES.items():
        grid = torch.arange(256, dtype=torch.uint8).view(dtype).float().nan_to_num(448.0).sort().values
        grid = torch.cat((grid, (grid[1:] + grid[:-1]) / 2, grid * 1.01, torch.tensor([1e-30]))).clamp(-448, 448)
        grid = torch.nn.functional.pad(grid, (0, -len(grid) % 64)).reshape(-1, 64)
        grid[:, 0] = 127.0 if kind == "int8" else 448.0  # a scale of 1
        S, D = grid.shape
        qkv = torch.cat((torch.zeros(S, 2 * D), grid), 1)[None]
        ours, plain = (kv_cache.allocate((1, 1, S, D), torch.float32, kind, "cpu") for _ in range(2))
        pos = torch.zeros(1, dtype=torch.int64)
        cpu.attention(qkv, *ours[:2], pos, None, None, None, 0.0, 1, 0, *ours[2:])
        attention_plain(qkv, *plain[:2], pos, None, None, None, 0.0, 1, 0, None, 0.0, None, *plain[2:])
        for own, other in zip(ours, plain):
            assert torch.equal(own.view(torch.uint8), other.view(torch.uint8))
        qkv[0, 3, -1] = math.nan
        y = cpu.attention(qkv, *ours[:2], pos, None, None, None, 0.0, 1, 0, *ours[2:])
        assert y[0, 3:].isnan().all()


def test_ops_have_the_shapes_that_compilation_assumes():
    layer, _ = packed("int4:32", 32, 64, torch.bfloat16)
    x, none = torch.randn(3, 64, dtype=torch.bfloat16), None
    args = (x, layer.weight, layer.scales, layer.zeros, layer.bias, none, 0.0, none, 32)
    for wide, gate_up in ((False, False), (True, False), (False, True)):
        own = (*args, wide, gate_up)
        torch.library.opcheck(torch.ops.gptfast.cpu_linear.default, own, test_utils=("test_faketensor",))
    qkv, caches = torch.randn(1, 2, 64), [torch.zeros(1, 1, 8, 16) for _ in range(2)]
    args = (qkv, *caches, torch.zeros(1, dtype=torch.int64), none, none, none, 0.0, 2, 0)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.gptfast.cpu_attention.default, args, test_utils=checks)
    cache = kv_cache.allocate((1, 1, 8, 16), torch.float32, "int8", "cpu")
    args = (qkv, *cache[:2], *args[3:], *cache[2:])
    torch.library.opcheck(torch.ops.gptfast.cpu_attention.default, args, test_utils=checks)


def test_without_a_compiler_plain_pytorch_serves(tmp_path, cli):
    from tiny import write_checkpoint  # which takes seconds to import

    write_checkpoint(tmp_path)
    args = ("--checkpoint_path", tmp_path / "model.pth", "--precision", "fp32", "--temperature", 0)
    args += ("--device", "cpu", "--max_new_tokens", 8, "--prompt", "abc")
    compiled = run_forked("generate.py", *args)
    assert compiled.status == 0 and "plain PyTorch serves" not in compiled.stderr
    for lack in ({"CXX": "/nowhere/c++"}, {"CXX": "false"}, {"XDG_CACHE_HOME": "/proc/nowhere"}):
        plain = cli("generate.py", *args, env={"XDG_CACHE_HOME": str(tmp_path / "cache"), **lack})
        assert (plain.status, plain.stdout) == (0, compiled.stdout), lack
        assert "plain PyTorch serves" in plain.stderr, lack
