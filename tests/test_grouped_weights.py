"""Layouts of other programs' weights: int4 with scales in fp16, and 8-bit weights in groups, against what they stand
for; kernels through Triton's interpreter on the CPU, and on CUDA where there is one."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from test_kernels import DEVICE, DTYPES, error, make_rows, on_device, plain, scalars_index
from test_many_rows import ROUNDED

import ops
from linear import Linear
from ops import linear_gemm, linear_triton, linear_wide, tuning
from ops.packing import dequantize, group_size, pack_grouped, pack_int4
from ops.tuning import Tile
from tp import TensorParallel

__all__ = ["scalars_index"]  # a fixture
LAYOUTS = ["int4:32", "int4:128", "int8:16", "int8:32 zeros", "int8:128", "fp8:128"]


def on_disk(layout, N, K, seed=0):
    """A linear layer's tensors as linear.py has them: scales in fp16, of fp8 in fp32, zeros of int4 in fp32."""
    generator = torch.Generator().manual_seed(seed)
    (kind, rest), zeros = layout.split(":"), "zeros" in layout
    group = int(rest.split()[0])
    scales = (torch.rand(N, -(-K // group), generator=generator) / 16 / K**0.5).half()
    if kind == "int4":
        q = torch.randint(0, 256, (N, scales.shape[1] * group // 2), generator=generator, dtype=torch.uint8)
        points = torch.randint(0, 16, scales.shape, generator=generator)
        return {"weight": q, "scales": scales, "zeros": (8 - points) * scales.float()}
    if kind == "fp8":
        weight = (torch.randn(N, K, generator=generator) * 64).to(torch.float8_e4m3fn)
        return {"weight": weight, "scales": scales.float() * 1.01}
    weight = torch.randint(-128, 128, (N, K), generator=generator, dtype=torch.int8)
    return {"weight": weight, "scales": scales} | ({"zeros": scales * 7} if zeros else {})


def packed(own):
    """What the kernels read: weight and scales."""
    if own["weight"].dtype is torch.uint8:
        return pack_int4(own["weight"], own["scales"], own["zeros"])
    return own["weight"], pack_grouped(own["scales"], own.get("zeros"))


def dense(own, K):
    return dequantize(own["weight"], own["scales"], own.get("zeros"), torch.float32)[:, :K]


@pytest.mark.parametrize("K,group", [(100, 16), (100, 32), (2112, 128), (4096, 256), (40, 32), (576, 64)])
def test_a_groups_size_is_told_by_how_many_there_are(K, group):
    assert group_size(K, -(-K // group)) == group


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_group_stands_for(layout):
    K, own = 288, on_disk(layout, 16, 288)
    q = own["weight"].double()
    if layout.startswith("int4"):
        q = torch.stack((own["weight"] & 15, own["weight"] >> 4), -1).flatten(1).double() - 8
    group = int(layout.split(":")[1].split()[0])
    of = torch.arange(q.shape[1]) // group
    expected = q * own["scales"].double()[:, of] + (own["zeros"].double()[:, of] if "zeros" in own else 0)
    assert torch.equal(dense(own, K), expected[:, :K].float())
    assert torch.equal(dequantize(*packed(own), None, torch.float32)[:, :K], dense(own, K).float()) or "int4" in layout
    assert error(dequantize(*packed(own), None, torch.float32)[:, :K], expected[:, :K]) < 2**-12  # zeros in fp16
    layer = Linear(K, 16).assign(own)
    assert torch.equal(layer.dequantized(torch.float32), dense(own, K))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("part", [range(128), range(128, 256), range(192, 288), range(144, 288), range(216, 300)])
def test_columns_of_a_rank_have_the_values_of_the_whole(layout, part):
    K, own = 288, on_disk(layout, 16, 288)
    layer = Linear(K, 16, tp=TensorParallel(0, 2), columns=part)
    cut = layer.shard(own)
    layer.assign(cut)
    inside = dense(own, K)[:, part.start : part.stop]
    assert torch.equal(layer.dequantized(torch.float32)[:, : inside.shape[1]], inside)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("M,N,K", [(1, 24, 576), (5, 24, 288)])
def test_decode(layout, M, N, K, dtype):
    own, generator = on_disk(layout, N, K), torch.Generator().manual_seed(1)
    x, gain = make_rows(M, K, generator=generator).to(dtype), torch.rand(K, generator=generator).to(dtype)
    w, s = packed(own)
    matrix = dequantize(w, s, None, torch.float32)[:, :K]
    x, w, s, matrix, gain = on_device(x, w, s, matrix, gain)
    out = linear_triton.linear(x, w, s, out_dtype=torch.float32)
    assert error(out, x.float() @ matrix.T) < (1e-5 if layout.startswith("int4") else ROUNDED[dtype])
    out = linear_triton.linear(x, w, s, None, gain, 1e-5)
    assert error(out, plain(x.float(), matrix, None, gain)) < 6e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_rows(layout, dtype, monkeypatch):
    M, N, K = 17, 72, 160
    monkeypatch.setattr(tuning, "tile", lambda *_: Tile(16, 1, 1, 4, 3, 1))
    w, s = packed(on_disk(layout, N, K))
    x = make_rows(M, K, generator=torch.Generator().manual_seed(1)).to(dtype)
    matrix = dequantize(w, s, None, torch.float32)[:, :K]
    x, w, s, matrix = on_device(x, w, s, matrix)
    out = linear_gemm.gemm(x, w, s, None, None, 0.0, None, torch.float32, False)
    assert error(out, x.float() @ matrix.T) < ROUNDED[dtype]
    widened = linear_wide.widen(w, s, 0, N, torch.empty(N, K, dtype=dtype, device=DEVICE))
    assert error(widened, matrix) < ROUNDED[dtype]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_cpu(layout, dtype):
    K, own = 288, on_disk(layout, 32, 288)
    layer = Linear(K, 32).assign(own)
    layer.pack(dtype)
    assert layer.backends[0].__name__ == "_cpu"
    for rows in (1, 5, 40, 100):
        x = torch.randn(rows, K, generator=torch.Generator().manual_seed(rows)).to(dtype)
        bound = 5e-4 if dtype is torch.float32 else 6e-3 if layout.startswith("fp8") else 1.5e-2  # int8 activations
        assert error(ops.linear(layer, x), x.double() @ dense(own, K).double().T) < bound
