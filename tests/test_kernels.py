"""The kernels against their references: through Triton's interpreter on the CPU, and on CUDA where there is one."""

import itertools
import math
import os
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # has to be set before Triton is imported

import ops  # noqa: E402
from linear import Linear  # noqa: E402
from ops import embedding, kv_cache, linear_triton, ngram, philox, sampling, tuning  # noqa: E402
from ops.attention import _write_cache, attention_plain  # noqa: E402
from ops.attention_triton import attention_triton, plan  # noqa: E402
from ops.packing import dequantize, pack_int4, pack_mxfp4, unpack_int4, unpack_mxfp4  # noqa: E402
from ops.prefill import attention_prefill  # noqa: E402
from ops.rms_norm import rms_norm  # noqa: E402
from ops.verify import verify_plain, verify_triton  # noqa: E402

pytest.importorskip("triton", reason="the kernels need Triton")
from triton.runtime import interpreter  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"


@pytest.fixture(autouse=True)
def scalars_index(monkeypatch):
    """Triton 3.6's interpreter keeps scalars as arrays of one element, which NumPy 2.4 no longer turns into an int."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


KINDS = ["16-bit", "int8", "fp8", "int4:32", "int4:64", "int4:128", "int4:256", "mxfp4"]
DTYPES = [torch.float16, torch.bfloat16] if CUDA else [torch.float16]  # the interpreter has no arithmetic in bf16


def make_weight(kind, N, K, dtype, generator):
    """A random weight (N, K) as `linear` reads it on CUDA, and the fp32 matrix it stands for."""
    w = torch.randn(N, K, generator=generator) / K**0.5
    if kind == "16-bit":
        return w.to(dtype), None, w.to(dtype).float()
    if kind == "int8":
        q = torch.randint(-128, 128, (N, K), generator=generator, dtype=torch.int8)
        scales = (torch.rand(N, generator=generator) / 64 / K**0.5).bfloat16()
        return q, scales, q.float() * scales.float()[:, None]
    if kind == "fp8":
        q = (w * 64).to(torch.float8_e4m3fn)
        q.view(torch.uint8)[0, :8] = torch.tensor(
            [0, 128, 1, 129, 7, 8, 126, 254], dtype=torch.uint8
        )  # +-0, subnormals, +-448
        scales = (torch.rand(N, generator=generator) / 64).bfloat16()
        return q, scales, q.float() * scales.float()[:, None]
    if kind == "mxfp4":
        q, scales = (torch.randint(*of, generator=generator, dtype=torch.uint8) for of in mxfp4_shapes(N, K))
        return *pack_mxfp4(q, scales), dequantize(q, scales, None, torch.float32)
    group, of = int(kind[5:].split()[0]), torch.float16 if kind.endswith("fp16") else torch.bfloat16
    K4 = -(-K // group) * group
    q = torch.randint(0, 256, (N, K4 // 2), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(N, K4 // group, generator=generator) / K**0.5).to(of)
    zeros = (torch.randn(N, K4 // group, generator=generator) / K**0.5).to(of)
    words, pairs = pack_int4(q, scales, zeros)
    return words, pairs, dequantize(q, scales, zeros, torch.float32)[:, :K]


def mxfp4_shapes(N, K):
    """Bounds and shapes of random bytes, whose scales keep products near one."""
    return (0, 256, (N, K // 2)), (118, 125, (N, K // 32))


def plain(x, weight, bias=None, gain=None, residual=None, gate_up=False):
    """The reference, of a weight in x's dtype."""
    tensors = {"weight": weight} | ({"bias": bias} if bias is not None else {})
    layer = Linear(weight.shape[1], len(weight)).assign(tensors)
    layer.swiglu = gate_up
    return ops.plain(layer, x if gain is None else rms_norm(x, gain, 1e-5), None, residual)


def error(out, expected):
    return ((out.double() - expected.double()).norm() / expected.double().norm()).item()


def make_rows(*shape, generator):
    """Rows of x that 16-bit integers in groups hold exactly."""
    return (1024 * torch.randn(*shape, generator=generator)).round() / 1024


def on_device(*tensors):
    """What is not None, on DEVICE; PyTorch cannot poison memory of two floats a byte."""
    four = torch.float4_e2m1fn_x2
    return [t.view(torch.uint8).to(DEVICE).view(four) if getattr(t, "dtype", None) is four else
            t if t is None else t.to(DEVICE) for t in tensors]  # fmt: skip


@pytest.mark.parametrize("group,K", [(32, 576), (64, 512), (128, 384), (256, 768)])
def test_pack_int4_is_invertible(group, K):
    q = torch.randint(0, 256, (16, K // 2), dtype=torch.uint8)
    scales, zeros = torch.rand(2, 16, K // group).bfloat16()
    back = unpack_int4(*pack_int4(q, scales, zeros))
    for a, b in zip(back, (q, scales, zeros)):
        torch.testing.assert_close(a[:, : b.shape[1]], b, rtol=0, atol=0)
        assert not a[:, b.shape[1] :].float().sub(136 if a.dtype == torch.uint8 else 0).any()  # q = 8, scale = zero = 0


def test_pack_mxfp4_is_invertible():
    q, scales = (torch.randint(*of, dtype=torch.uint8) for of in mxfp4_shapes(16, 288))
    back = unpack_mxfp4(*pack_mxfp4(q, scales))
    assert torch.equal(back[0][:, :144], q) and torch.equal(back[1][:, :9], scales) and not back[0][:, 144:].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("M,N,K", [(1, 24, 576), (1, 24, 64), (5, 40, 1024), (16, 16, 288)])
def test_linear(kind, M, N, K, dtype):
    generator = torch.Generator().manual_seed(M * N * K)
    w, s, dense = make_weight(kind, N, K, dtype, generator)
    x = make_rows(M, K, generator=generator).to(dtype)
    gain = torch.rand(K, generator=generator).to(dtype)
    bias = torch.randn(N, generator=generator).to(dtype)
    residual = torch.randn(M, N, generator=generator).to(dtype)
    x, w, s, dense, gain, bias, residual = on_device(x, w, s, dense, gain, bias, residual)
    out = linear_triton.linear(x, w, s, out_dtype=torch.float32)
    assert error(out, x.float() @ dense.T) < 1e-5  # 16-bit products are exact in fp32, whatever the kind of weight
    out = linear_triton.linear(x, w, s, bias, gain, 1e-5, residual)
    expected = plain(x.float(), dense, bias, gain, residual)
    assert out.dtype == dtype
    assert error(out, expected) < 6e-3
    out = linear_triton.linear(x, w, s, None, gain, 1e-5, out_dtype=torch.float32)
    assert error(out, plain(x.float(), dense, None, gain)) < 4e-3  # x * gain is rounded


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["int8", "fp8", "int4:32", "int4:128"])
def test_one_row_of_any_magnitudes(kind, dtype):
    """Quantised weights meet x in 16-bit integers or in fp16, whose scale follows each group's largest magnitude."""
    generator = torch.Generator().manual_seed(6)
    w, s, dense = make_weight(kind, 24, 640, dtype, generator)
    x = torch.randn(1, 640, generator=generator) * torch.logspace(-4, 3, 640)
    x[0, 320:352] = 0
    x[0, 7] = 60000
    x = x.to(dtype)
    x, w, s, dense = on_device(x, w, s, dense)
    assert error(linear_triton.linear(x, w, s, out_dtype=torch.float32), x.float() @ dense.T) < 1e-4
    x[0, 100] = math.inf
    assert not linear_triton.linear(x, w, s, out_dtype=torch.float32).isfinite().any()


SHIPPED = {  # of all files; how many registers and programs a multiprocessor has is nothing to the interpreter
    (kind, columns, choice if CUDA else replace(choice, maxnreg=0, ctas_per_sm=min(choice.ctas_per_sm, 1)))
    for path in tuning.FOLDER.glob("*.json")
    for (kind, columns), own in tuning.read_file(path)[1].items()
    for choice in own.values()
}


@pytest.mark.parametrize("kind,columns,configuration", sorted(SHIPPED, key=repr))
def test_configurations(kind, columns, configuration, monkeypatch):
    few = replace(configuration, ctas_per_sm=min(configuration.ctas_per_sm, 1))
    N, K = 48 if few.tile_rows == 16 else 80, 2144  # three tiles of 16 rows, or two and a half of 32
    monkeypatch.setitem(tuning.tables(torch.device(DEVICE))[0], (kind, columns), {(N, K): few})
    monkeypatch.setattr(tuning, "processors", lambda _: 2)  # programs of several tiles
    kind, rows, dtype = {"fp": "16-bit", "int4": "int4:64"}.get(kind, kind), {1: 1, 8: 5, 16: 13}[columns], DTYPES[-1]
    generator = torch.Generator().manual_seed(3)
    w, s, dense = make_weight(kind, N, K, dtype, generator)
    x = make_rows(rows, K, generator=generator).to(dtype)
    gain = torch.rand(K, generator=generator).to(dtype)
    residual = torch.randn(rows, N // 2, generator=generator).to(dtype)
    x, w, s, dense, gain, residual = on_device(x, w, s, dense, gain, residual)
    assert error(linear_triton.linear(x, w, s, out_dtype=torch.float32), x.float() @ dense.T) < 1e-5
    expected = plain(x.float(), dense, None, gain, residual, gate_up=True)
    out = linear_triton.linear(x, w, s, None, gain, 1e-5, residual, swiglu=True)
    assert error(out, expected) < 1e-2  # x * gain is rounded, and the result


@pytest.mark.parametrize("kind", ["16-bit", "int8", "int4:32"])
@pytest.mark.parametrize("rows", [1, 5])
def test_programs_of_several_tiles_whose_step_is_all_of_K(kind, rows, monkeypatch):
    C = {"16-bit": 8, "int8": 4}.get(kind, 2)
    monkeypatch.setattr(tuning, "configuration", lambda *_: tuning.Configuration(16, C, 4, 128, 1))
    monkeypatch.setattr(tuning, "processors", lambda _: 2)
    generator = torch.Generator().manual_seed(7)
    for K in (1024, 992):
        w, s, dense = make_weight(kind, 88, K, torch.float16, generator)
        x, gain = make_rows(rows, K, generator=generator).half(), torch.rand(K, generator=generator).half()
        x, w, s, dense, gain = on_device(x, w, s, dense, gain)
        out = linear_triton.linear(x, w, s, None, gain, 1e-5, out_dtype=torch.float32)
        assert error(out, plain(x.float(), dense, None, gain)) < 4e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 5, 13])
def test_whole_steps_and_a_rest(kind, rows, monkeypatch):
    """K of whole steps, and of 32 values, or a group, more: steps are of 128 to 512 values."""
    monkeypatch.setattr(tuning, "configuration", lambda *_: tuning.Configuration(16, 1, 4, 128, 0))
    generator = torch.Generator().manual_seed(10)
    group = int(kind[5:]) if kind.startswith("int4") else 32
    for K in (1024, 1024 + group):
        w, s, dense = make_weight(kind, 32, K, DTYPES[-1], generator)
        x, gain = make_rows(rows, K, generator=generator).to(DTYPES[-1]), torch.rand(K, generator=generator)
        x, w, s, dense, gain = on_device(x, w, s, dense, gain.to(DTYPES[-1]))
        assert error(linear_triton.linear(x, w, s, out_dtype=torch.float32), x.float() @ dense.T) < 1e-5
        out = linear_triton.linear(x, w, s, None, gain, 1e-5, out_dtype=torch.float32)
        assert error(out, plain(x.float(), dense, None, gain)) < 4e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("programs,N", [(1, 80), (2, 80), (2, 208), (4, 48)])  # of a multiprocessor: of 2 there
def test_tiles_that_share_rows(programs, N, rows, kind, monkeypatch):
    """As without it: 64 rows at most, in eights or, of gate and up, in twice as many; uneven shares, several tiles a
    program, and programs without any."""
    monkeypatch.setattr(tuning, "processors", lambda _: 2)
    generator = torch.Generator().manual_seed(8)
    K = 608
    w, s, _ = make_weight(kind, N, K, DTYPES[-1], generator)
    x, gain, residual = make_rows(rows, K, generator=generator), torch.rand(K), torch.randn(rows, N)
    x, gain, residual = (t.to(DTYPES[-1]) for t in (x, gain, residual))
    x, w, s, gain, residual = on_device(x, w, s, gain, residual)
    results = []
    for share in (False, True):
        how = tuning.Configuration(64, 1, 2, 168, programs, share)
        monkeypatch.setattr(tuning, "configuration", lambda *_, how=how: how)
        linear = partial(linear_triton.linear, x, w, s, None, gain, 1e-5)
        results.append((linear(residual), linear(swiglu=True)))
    torch.testing.assert_close(*results, atol=2e-3, rtol=2e-3)  # NumPy does not sum in the same order


@pytest.mark.parametrize("kind", ["int4:32", "int4:128", "mxfp4"])
@pytest.mark.parametrize("rows", [1, 5, 13])
@pytest.mark.parametrize("N", [96, 120])  # three full tiles, and a last one that goes beyond N
@pytest.mark.parametrize("programs", [0, 1])  # of a tile each, and of several
def test_full_tiles_and_others(programs, N, rows, kind, monkeypatch):
    monkeypatch.setattr(tuning, "configuration", lambda *_: tuning.Configuration(32, 1, 2, 168, programs))
    monkeypatch.setattr(tuning, "processors", lambda _: 2)
    generator = torch.Generator().manual_seed(9)
    w, s, dense = make_weight(kind, N, 608, DTYPES[-1], generator)
    x = make_rows(rows, 608, generator=generator).to(DTYPES[-1])
    x, w, s, dense = on_device(x, w, s, dense)
    assert error(linear_triton.linear(x, w, s, out_dtype=torch.float32), x.float() @ dense.T) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 3])
def test_linear_with_swiglu(kind, rows, dtype):
    generator = torch.Generator().manual_seed(1)
    w, s, dense = make_weight(kind, 48, 576, dtype, generator)  # gate and up, interleaved by 8 rows
    x = torch.randn(rows, 576, generator=generator).to(dtype)
    gain = torch.rand(576, generator=generator).to(dtype)
    bias = torch.randn(48, generator=generator).to(dtype)
    x, w, s, dense, gain, bias = on_device(x, w, s, dense, gain, bias)
    out = linear_triton.linear(x, w, s, bias, gain, 1e-5, swiglu=True)
    expected = plain(x.float(), dense, bias, gain, gate_up=True)
    assert out.shape == expected.shape == (rows, 24)
    assert error(out, expected) < 1e-2


def make_attention(B, S, H, Hkv, D, T, rotary, dtype, generator):
    qkv = torch.randn(B, S, (H + 2 * Hkv) * D, generator=generator).to(dtype)
    k_cache, v_cache = torch.randn(2, B, Hkv, T, D, generator=generator).to(dtype)
    angles = torch.outer(torch.arange(T), 100.0 ** -(torch.arange(rotary // 2) / max(1, rotary // 2)))
    return qkv, k_cache, v_cache, torch.stack((angles.cos(), angles.sin()), dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "B,S,H,Hkv,D,T,rotary,window,norm,positions",
    [
        (1, 1, 4, 4, 64, 512, 64, 0, False, [300]),  # several parts
        (2, 1, 4, 2, 64, 512, 64, 0, False, [256, 257]),  # one part, which one step reads, and two
        (2, 3, 8, 2, 32, 200, 16, 0, True, [0, 150]),  # grouped heads, partial rotation, head norms, an empty row
        (2, 1, 4, 2, 80, 600, 80, 100, False, [520, 37]),  # a window, a head dimension that is no power of two
        (1, 16, 6, 2, 16, 96, 16, 20, False, [64]),
        (1, 8, 6, 2, 32, 1100, 32, 0, False, [1050]),  # five parts, two blocks of rows
        (1, 4, 2, 1, 16, 70, 0, 0, False, [68]),  # no rotation; the last tokens do not fit the cache
        (1, 2, 2, 1, 256, 90, 64, 0, False, [70]),
    ],
)
def test_attention(B, S, H, Hkv, D, T, rotary, window, norm, positions, dtype):
    generator = torch.Generator().manual_seed(2)
    qkv, k_cache, v_cache, rope = make_attention(B, S, H, Hkv, D, T, rotary, dtype, generator)
    q_norm, k_norm = torch.rand(2, D, generator=generator).to(dtype) if norm else (None, None)
    pos = torch.tensor(positions)
    rope = rope if rotary else None
    # What lies at or past a row's position, or before its window, is never read.
    for b in range(B):
        first = max(0, positions[b] - window + 1) if window else 0
        for cache in (k_cache, v_cache):
            cache[b, :, :first] = cache[b, :, pos[b] :] = math.nan
    qkv, k_cache, v_cache, rope, q_norm, k_norm, pos = on_device(qkv, k_cache, v_cache, rope, q_norm, k_norm, pos)
    k_expected, v_expected = (cache.float().nan_to_num(0) for cache in (k_cache, v_cache))
    arguments = (pos, rope, q_norm, k_norm, 1e-5, H, window)
    expected = attention_plain(qkv.float(), k_expected, v_expected, *arguments)
    for _ in range(2):  # the counters are left as they were found
        out = attention_triton(qkv, k_cache, v_cache, *arguments, prefetch=qkv, prefetch_lines=qkv.nbytes // 128)
        fit = min(S, T - int(pos.max()))
        assert error(out[:, :fit], expected[:, :fit]) < 1e-2
    for cache, other in ((k_cache, k_expected), (v_cache, v_expected)):
        for b in range(B):
            end = min(int(pos[b]) + S, T)
            assert error(cache[b, :, pos[b] : end], other[b, :, pos[b] : end]) < 4e-3
            assert cache[b, :, end:].isnan().all()


@pytest.mark.parametrize("kind", [None, "int8", "fp8"])
@pytest.mark.parametrize(
    ("few", "many", "two", "warps"),
    [
        (4, 4, 264, 8),  # few
        (3, 4, 264, 4),
        (0, 3, 264, 4),  # many
        (0, 3, 4, 4),  # as many as two a multiprocessor hold
        (0, 3, 3, 2),  # more
    ],
)
def test_attention_of_many_rows(few, many, two, warps, kind, monkeypatch):
    """Two rows of two key heads, which are few or many."""
    monkeypatch.setattr("ops.attention_triton.FEW", few)
    monkeypatch.setattr("ops.attention_triton.MANY", many)
    monkeypatch.setattr("ops.attention_triton.TWO_EACH", two)
    dtype, positions = torch.bfloat16 if CUDA else torch.float16, (150, 67)
    how = plan("16-bit" if kind is None else kind, 64, 1, 4)
    assert how.warps == (warps if kind is None else min(warps, 4))
    assert (how.maxnreg is None) == (many == 4 or warps == 2 or kind is not None)
    generator = torch.Generator().manual_seed(2)
    qkv, *values, rope = make_attention(2, 1, 8, 2, 64, 200, 64, dtype, generator)
    cache = kv_cache.allocate((2, 2, 200, 64), dtype, kind, "cpu")
    for i, value in enumerate(values):
        own = (value,) if kind is None else kv_cache.quantize(value, cache[i].dtype)
        for to, part in zip(cache[i::2], own):
            to[:, :, :200] = part
    qkv, rope, pos, *cache = on_device(qkv, rope, torch.tensor(positions), *cache)
    plain, rest = [t.clone() for t in cache], (pos, rope, None, None, 0.0, 8, 0, None, 0.0, None)
    wide = [t.float() if kind is None else t for t in plain[:2]]
    expected = attention_plain(qkv.float(), *wide, *rest, *plain[2:])
    assert error(attention_triton(qkv, *cache[:2], *rest, *cache[2:]), expected) < 1e-2


SCORES = [  # scale, soft cap, sinks
    (0.3, 0.0, False),
    (None, 2.5, False),
    (None, 0.0, True),
    (0.2, 4.0, True),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale,soft_cap,with_sinks", SCORES)
@pytest.mark.parametrize(
    "B,S,H,Hkv,D,T,window,positions",
    [
        (2, 1, 4, 2, 64, 300, 0, [250, 0]),  # two parts, an empty row
        (1, 3, 8, 2, 32, 90, 20, [60]),
        (2, 20, 6, 2, 80, 200, 30, [150, 7]),  # of many tokens
        (1, 40, 2, 1, 32, 100, 0, [33]),
    ],
)
def test_attention_with_other_scores(B, S, H, Hkv, D, T, window, positions, scale, soft_cap, with_sinks, dtype):
    generator = torch.Generator().manual_seed(5)
    qkv, k_cache, v_cache, rope = make_attention(B, S, H, Hkv, D, T, D, dtype, generator)
    sinks = 2 * torch.randn(H, generator=generator).to(dtype) if with_sinks else None
    qkv, k_cache, v_cache, rope, sinks, pos = on_device(qkv, k_cache, v_cache, rope, sinks, torch.tensor(positions))
    rest = (pos, rope, None, None, 0.0, H, window, scale, soft_cap)
    expected = attention_plain(qkv.double(), k_cache.double(), v_cache.double(), *rest, sinks)
    out = (attention_triton if S <= 16 else attention_prefill)(qkv, k_cache, v_cache, *rest, sinks)
    assert error(out, expected) < 6e-3


def test_attention_plain_is_what_papers_say(monkeypatch):
    monkeypatch.setattr(sys.modules["ops.attention"], "SCORES", 64)  # slices of a few queries
    generator, H, G, D, start = torch.Generator().manual_seed(3), 4, 2, 16, 5
    for S, scale, soft_cap, with_sinks, window in itertools.product((1, 9), (None, 0.3), (0.0, 2.0), (0, 1), (0, 4)):
        qkv, k_cache, v_cache, _ = make_attention(1, S, H, H // G, D, 20, 0, torch.float64, generator)
        sinks = torch.randn(H, generator=generator, dtype=torch.float64) if with_sinks else None
        q, k, v = qkv.view(S, -1, D).split((H, H // G, H // G), 1)
        rest = (None, None, None, 0.0, H, window, scale, soft_cap, sinks)
        out = attention_plain(qkv, k_cache, v_cache, torch.tensor([start]), *rest).view(S, H, D)
        k, v = (torch.cat((c[0, :, :start].transpose(0, 1), new)) for c, new in ((k_cache, k), (v_cache, v)))
        expected = torch.empty_like(out)
        for s, h in itertools.product(range(S), range(H)):
            seen = slice(max(0, start + s - window + 1) if window else 0, start + s + 1)
            scores = k[seen, h // G] @ q[s, h] * (scale or D**-0.5)
            scores = soft_cap * torch.tanh(scores / soft_cap) if soft_cap else scores
            weights = scores.exp() / (scores.exp().sum() + (sinks[h].exp() if with_sinks else 0))
            expected[s, h] = weights @ v[seen, h // G]
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("host", [False, True] if CUDA else [False])  # whether it knows a GPU's positions
@pytest.mark.parametrize(
    "B,S,H,Hkv,D,T,rotary,window,norm,positions",
    [
        (1, 17, 4, 2, 64, 512, 64, 0, False, [300]),
        (2, 150, 4, 1, 32, 400, 16, 0, True, [0, 150]),  # an empty row; head norms; two blocks of queries
        (1, 130, 4, 2, 80, 600, 80, 100, False, [333]),  # a window, a head dimension that is no power of two
        (1, 64, 2, 1, 16, 300, 0, 0, False, [252]),  # no rotation; the last tokens do not fit the cache
        (1, 70, 2, 1, 256, 200, 64, 0, False, [100]),  # blocks of fewer queries
        (1, 70, 2, 1, 512, 200, 64, 0, False, [100]),
    ],
)
def test_attention_of_many_tokens(B, S, H, Hkv, D, T, rotary, window, norm, positions, host, dtype):
    if host:
        positions = positions[-1:] * B  # which are alike
    generator = torch.Generator().manual_seed(3)
    qkv, k_cache, v_cache, rope = make_attention(B, S, H, Hkv, D, T, rotary, dtype, generator)
    q_norm, k_norm = torch.rand(2, D, generator=generator).to(dtype) if norm else (None, None)
    pos = torch.tensor(positions)
    for b in range(B):
        k_cache[b, :, pos[b] :] = v_cache[b, :, pos[b] :] = math.nan
    rope = rope if rotary else None
    qkv, k_cache, v_cache, rope, q_norm, k_norm = on_device(qkv, k_cache, v_cache, rope, q_norm, k_norm)
    k_expected, v_expected = (cache.float().nan_to_num(0) for cache in (k_cache, v_cache))
    rest = (rope, q_norm, k_norm, 1e-5, H, window)
    expected = attention_plain(qkv.float(), k_expected, v_expected, pos.to(DEVICE), *rest)
    out = attention_prefill(qkv, k_cache, v_cache, pos if host else pos.to(DEVICE), *rest)
    fit = min(S, T - int(pos.max()))
    assert error(out[:, :fit], expected[:, :fit]) < 1e-2
    for cache, other in ((k_cache, k_expected), (v_cache, v_expected)):
        for b in range(B):
            end = min(int(pos[b]) + S, T)
            assert error(cache[b, :, :end], other[b, :, :end]) < 4e-3
            assert cache[b, :, end:].isnan().all()


@pytest.mark.cuda
def test_attention_gives_the_same_bits_every_time():
    """Its parts take turns for two layers, so that a message of the other layer's would show."""
    generator = torch.Generator().manual_seed(2)
    layers = [on_device(*make_attention(1, 1, 8, 2, 64, 1100, 64, torch.bfloat16, generator)) for _ in range(2)]
    for position in (200, 1050):
        pos = torch.tensor([position], device=DEVICE)
        outputs = [[], []]
        for _ in range(300):
            for (qkv, k, v, rope), own in zip(layers, outputs):
                own.append(attention_triton(qkv, k, v, pos, rope, None, None, 1e-5, 8, 0))
        assert all(torch.equal(out, own[0]) for own in outputs for out in own)


@pytest.mark.parametrize("B,V,programs", [(1, 1000, 2112), (2, 2500, 2112), (2, 5000, 4)])
@pytest.mark.parametrize(
    "temperature,top_k,min_p",
    [(0.0, 5, 0.0), (0.8, 200, 0.0), (1.3, 0, 0.0), (1.0, 50, 0.02), (0.7, 0, 0.1), (1.0, 1, 0)],
)
def test_sample_draws_what_the_reference_draws(B, V, programs, temperature, top_k, min_p, monkeypatch):
    monkeypatch.setattr(sampling, "PROGRAMS", programs)  # with 4, a program looks at 4,096 logits of 5,000
    logits = 3 * torch.randn(B, V, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    rng = torch.tensor([1234567890123, 7], device=DEVICE)
    history, pos = torch.full((B, 7), -1, device=DEVICE), torch.tensor([4, 0][:B], device=DEVICE)
    states = [(rng, history, pos), (rng.clone(), history.clone(), pos.clone())]
    for step in range(2):
        drawn = sampling.sample_triton(logits, temperature, top_k, min_p, *states[0])
        assert sampling.sample_plain(logits, temperature, top_k, min_p, *states[1]).tolist() == drawn.tolist()
        assert all(map(torch.equal, *states))
        assert rng.tolist() == [1234567890123, 8 + step]
        assert history.gather(1, pos[:, None]).flatten().tolist() == drawn.tolist()
        assert pos.tolist() == [5 + step, 1 + step][:B] and (history < 0).sum() == B * (6 - step)
    assert sampling.sample_triton(logits, 0.0, 0, 0.0, rng).tolist() == logits.argmax(1).tolist()
    assert torch.equal(history, states[1][1])  # written only when asked to


def test_sample_draws_again_where_many_listed_tokens_are_out():
    """Sorted logits: of their maxima's parts, 20 hold the 20 largest, and 2,560 others, more than settled at once."""
    logits = torch.linspace(1, 0, 9000).repeat(2, 1).to(DEVICE)
    logits[1, 40:] = -math.inf
    states = [torch.tensor([seed, 0], device=DEVICE) for seed in (3, 3)]
    drawn = torch.stack([sampling.sample_triton(logits, 1.0, 20, 0.0, states[0]) for _ in range(20)])
    expected = torch.stack([sampling.sample_plain(logits, 1.0, 20, 0.0, states[1]) for _ in range(20)])
    assert torch.equal(drawn, expected) and len(set(drawn[:, 0].tolist())) > 5
    logits[0], logits[1, 100:200] = math.nan, math.nan  # nothing is promised but a token of the vocabulary
    assert all(0 <= token < 9000 for token in sampling.sample_triton(logits, 1.0, 20, 0.1, states[0]).tolist())


def test_sample_keeps_ties_and_takes_the_first_when_greedy():
    logits = torch.zeros(1, 1500, device=DEVICE)
    logits[0, [7, 70, 1400]] = 1.0
    logits[0, 5] = -math.inf
    rng = torch.tensor([0, 0], device=DEVICE)
    assert sampling.sample_triton(logits, 0.0, 0, 0.0, rng).item() == 7
    drawn = {sampling.sample_triton(logits, 1.0, 2, 0.0, rng).item() for _ in range(16)}
    assert drawn == {7, 70, 1400}  # all three equal the second largest
    flat = {sampling.sample_triton(torch.zeros(1, 1500, device=DEVICE), 1.0, 10, 0.0, rng).item() for _ in range(6)}
    assert len(flat) > 3


def test_sample_follows_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, -1.0, 2.5]])
    counts = torch.zeros(6)
    for seed in range(2000):
        rng = torch.tensor([seed, 0])
        counts[sampling.sample_plain(logits, 0.9, 4, 0.0, rng)] += 1
    probs = torch.softmax(logits[0].masked_fill(logits[0] < 1, -math.inf) / 0.9, -1)
    assert (counts / 2000 - probs).abs().max() < 0.04


@pytest.mark.parametrize(
    "top_k,min_p", [(0, 0.0), (1, 0.0), (200, 0.0), (50, 0.02), (0, 0.1), (5000, 0.0), (1000, 0.0), (313, 0.0)]
)
def test_logit_threshold_is_the_smallest_logit_kept(top_k, min_p):
    logits = 3 * torch.randn(3, 2500, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    logits[0, :1100] = 0.5  # more equals than a program holds
    logits[2] = logits[2] / 3 + 40  # bits that all have in common,
    logits[2, ::8] += 20  # and others that the maxima have
    expected = sampling.logit_threshold_plain(logits, 0.9, top_k, min_p)
    kept = (logits >= expected).sum(1)
    assert (kept >= 1).all() and (not 0 < top_k < 2500 or kept[1] <= top_k)
    for _ in range(2):
        threshold = sampling.logit_threshold_triton(logits, 0.9, top_k, min_p)
        assert ((logits >= threshold) == (logits >= expected)).all()


@pytest.mark.parametrize("V", [700, 9000])
def test_verify_is_the_reference(V):
    B, k, generator = 2, 3, torch.Generator().manual_seed(6)
    target = 2 * torch.randn(B * (k + 1), V, generator=generator)
    draft = target.view(B, k + 1, V)[:, :k].flatten(0, 1) + 0.5 * torch.randn(B * k, V, generator=generator)
    draft[0] = target[0]  # equal: accepted for sure
    logits = torch.cat((target, draft)).to(DEVICE)
    thresholds = sampling.logit_threshold_plain(logits, 1.0, 40, 0.0)
    draft_tokens = logits[B * (k + 1) :].argmax(1).view(B, k)
    verified = []
    for seed in range(20):
        rng = torch.tensor([seed, 3], device=DEVICE)
        expected = verify_plain(logits, thresholds, draft_tokens, 0.8, rng.clone())
        verified.append(verify_triton(logits, thresholds, draft_tokens, 0.8, rng))
        assert verified[-1].tolist() == expected.tolist()
        assert rng.tolist() == [seed, 4]
    accepted = torch.stack(verified)[:, :, :k] == draft_tokens
    assert accepted[:, 0, 0].all() and 0.3 < accepted.float().mean() < 0.99


def test_gumbel_is_philox():
    # Known answers for Philox4x32-10 (Random123's kat_vectors): counter and key all zero, and all ones.
    def word(noise):
        return (1 - torch.exp(-torch.exp(-noise.double()))).item() * 2**32

    zero = torch.zeros(1, dtype=torch.int64)
    assert word(philox.gumbel(torch.tensor([0, 0]), zero, zero)) == pytest.approx(0x6627E8D5, rel=1e-5)
    ones = zero + 0xFFFFFFFF
    assert word(philox.gumbel(torch.tensor([-1, -1]), ones, ones)) == pytest.approx(0x408F276D, rel=1e-5)


def test_copy_match_writes_what_the_reference_writes():
    history = torch.randint(0, 3, (6, 2600), generator=torch.Generator().manual_seed(8)).to(DEVICE)
    pos = torch.tensor([1, 4, 40, 1024, 1500, 2500], device=DEVICE)
    for k in (1, 5, 15):
        expected = history.clone()
        ngram.copy_match_plain(expected, pos, k)
        ngram.copy_match_triton(history, pos, k)
        torch.testing.assert_close(history, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("C,first", [(72, None), (1030, None), (72, 20), (1030, 0)])
def test_embedding(C, first, dtype, monkeypatch):
    generator = torch.Generator().manual_seed(9)
    table = torch.randn(40, C, generator=generator).to(dtype).to(DEVICE)
    tokens = torch.randint(0, 40 if first is None else 80, (3, 21), generator=generator).to(DEVICE)
    poisoned = embedding.embedding_fake
    monkeypatch.setattr(embedding, "embedding_fake", lambda *rest: poisoned(*rest).fill_(math.nan))
    for start, new in ((None, 21), ([0, 20, 7], 1), ([19, 0, 4], 2)):
        start = start and torch.tensor(start, device=DEVICE)
        out = embedding.embedding_triton(table, tokens, start, new, first)
        for row in range(3):
            begin = 0 if start is None else int(start[row])
            for i, token in enumerate((tokens[row, begin : begin + new] - (first or 0)).tolist()):
                assert torch.equal(out[row, i], table[token] if 0 <= token < 40 else torch.zeros_like(table[0]))
        assert torch.equal(embedding.embedding_plain(table, tokens, start, new, first), out)
    assert first is None or 0 < (out == 0).all(2).sum() < 6


def test_ops_trace():
    table, w = torch.randn(24, 64, device=DEVICE).half(), torch.randn(48, 64, device=DEVICE).half()
    gain, cache = torch.rand(64, device=DEVICE).half(), torch.zeros(2, 2, 1, 8, 16, device=DEVICE).half()
    rng, history, pos = (torch.tensor(t, device=DEVICE) for t in ([5, 0], [[1, 0, 0, 0], [7, 8, 9, 0]], [0, 2]))

    def step(k_cache, v_cache, rng, history, pos):
        x = ops.embed(table, history, pos, 1)
        qkv = linear_triton.linear(x, w, norm=gain, eps=1e-5)
        y = attention_triton(qkv, k_cache, v_cache, pos, None, None, None, 0.0, 1, 0)
        z = linear_triton.linear(x, w, norm=gain, eps=1e-5, out_dtype=torch.float32, swiglu=True)
        return y, ops.sample(z[:, -1], 0.9, 0, 0.0, rng, history, pos)

    state = (*cache, rng, history, pos)
    compiled_state = [t.clone() for t in state]
    expected = step(*state)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled_state)
    torch.testing.assert_close((*compiled, *compiled_state), (*expected, *state))


def test_cache_writes_stop_at_its_end():
    cache = torch.zeros(1, 1, 4, 2)
    _write_cache(cache, torch.ones(1, 3, 1, 2), torch.tensor([2]))
    assert cache[0, 0, :, 0].tolist() == [0, 0, 1, 1]
    _write_cache(cache, torch.ones(1, 3, 1, 2), torch.tensor([9]))
    assert cache[0, 0, :, 0].tolist() == [0, 0, 1, 1]


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("M", [1, 2, 8, 9, 16])
def test_linear_in_model_shapes(kind, M, dtype):
    generator = torch.Generator().manual_seed(M)
    for N, K in ((4096, 4096), (2048, 8192), (4096, 11008), (49152, 576)):
        w, s, dense = on_device(*make_weight(kind, N, K, dtype, generator))
        x = torch.randn(M, K, generator=generator).to(dtype).to(DEVICE)
        gain = torch.rand(K, generator=generator).to(dtype).to(DEVICE)
        torch.empty(M, N, dtype=dtype, device=DEVICE).fill_(math.nan)  # poison what the output may be allocated from
        out = linear_triton.linear(x, w, s, norm=gain, eps=1e-5)
        expected = rms_norm(x, gain, 1e-5).double() @ dense.double().T
        assert error(out, expected) < 8e-3
