"""Linear layers of more rows than a decode step has: the GEMM, widening, and the choice between them."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
from test_kernels import CUDA, DEVICE, DTYPES, KINDS, error, make_rows, make_weight, on_device, plain, scalars_index

import ops
from linear import Linear
from ops import linear_gemm, linear_wide, tuning
from ops.common import counters
from ops.linear import _over_ranks
from ops.packing import dequantize
from ops.tuning import Tile

__all__ = ["scalars_index"]  # a fixture


@pytest.fixture(autouse=True)
def poisoned():
    """What nothing has written is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def make_case(kind, M, N, K, dtype, swiglu, seed=0):
    """A weight, rows of x and all that may come with them; and the matrix that the weight stands for."""
    generator = torch.Generator().manual_seed(seed)
    w, s, dense = make_weight(kind, N, K, dtype, generator)
    x = make_rows(M, K, generator=generator).to(dtype)
    gain, bias = torch.rand(K, generator=generator).to(dtype), torch.randn(N, generator=generator).to(dtype)
    residual = torch.randn(M, N // 2 if swiglu else N, generator=generator).to(dtype)
    return on_device(x, w, s, dense, gain, bias, residual)


def check(run, case, exact, bound, swiglu):
    """run(x, weight, ...) gives W x to `exact`, and all that the interface offers to `bound`."""
    x, w, s, dense, gain, bias, residual = case
    y = run(x, w, s, None, None, 0.0, None, torch.float32, False)
    assert y.dtype == torch.float32
    assert error(y, x.double() @ dense.double().T) < exact
    y = run(x, w, s, bias, gain, 1e-5, residual, x.dtype, swiglu)
    expected = plain(x.float(), dense, bias, gain, residual, swiglu)
    assert y.dtype == x.dtype and y.shape == expected.shape
    assert error(y, expected) < bound


ROUNDED = {torch.float16: 5e-4, torch.bfloat16: 4e-3}  # what rounding each factor of a product costs


def exact(kind, dtype):
    """int4 is widened to what `dequantize` makes of it; int8 meets x in multiples of its row's largest / 32,639."""
    return ROUNDED[dtype] if kind.startswith("int4") else 1e-4 if kind == "int8" else 1e-5


SMALL = Tile(16, 1, 1, 4, 3, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "kind,M,N,K,tile,swiglu",
    [
        *((kind, 17, 80, 288, SMALL, True) for kind in KINDS),  # tiles that are not full along any axis
        *((kind, 33, 144, 768, Tile(64, 2, 2, 4, 2, 3), False) for kind in ("16-bit", "int8", "int4:64")),  # shared
        *((kind, 20, 144, 800, Tile(32, 1, 2, 8, 2, 2), True) for kind in ("fp8", "int4:128")),
        *((kind, 18, 144, 544, Tile(32, 2, 1, 4, 3, 1, 80), kind != "fp8") for kind in KINDS),  # 80 of 128 rows
        ("int8", 18, 144, 2112, Tile(32, 1, 2, 4, 3, 2, 48), True),
    ],
)
def test_gemm(kind, M, N, K, tile, swiglu, dtype, monkeypatch):
    monkeypatch.setattr(tuning, "tile", lambda *_: tile)
    check(linear_gemm.gemm, make_case(kind, M, N, K, dtype, swiglu), exact(kind, dtype), 2 * ROUNDED[dtype], swiglu)
    assert not counters(torch.device(DEVICE), linear_gemm.TILES).any()


def test_int8_weights_meet_x_in_fixed_point(monkeypatch):
    """Products and sums of it are exact: W x is what the two int8 parts say, and no row is further from x (M, K) than
    half a multiple in each feature; NaN and infinities stay what they are."""
    monkeypatch.setattr(tuning, "tile", lambda *_: Tile(32, 1, 2, 4, 3, 2))
    dtype = DTYPES[-1]
    x, w, s, *_ = make_case("int8", 19, 64, 2112, dtype, False)
    x[1] = 0
    x[2, 7] = 2000.0
    x[3] *= 1e-5
    x[4, 100], x[5, 2000] = float("nan"), float("inf")
    for gain in (None, torch.rand(2112, dtype=dtype, device=DEVICE) + 0.5):
        out = torch.empty(32, 2, 2176, dtype=torch.int8, device=DEVICE)
        scales = linear_gemm.fixed_point(x, gain, 1e-5, out).double()
        wanted = x.double()
        if gain is not None:
            wanted = wanted * (wanted.square().mean(1, keepdim=True) + 1e-5).rsqrt() * gain.double()
        codes = 256 * out[:19, 0].double() + out[:19, 1].double()
        sound = torch.tensor([row not in (4, 5) for row in range(19)])
        assert not codes[sound, 2112:].any() and not scales[~sound].isfinite().any()
        found = codes[:, :2112] * scales[:, None]
        assert ((found - wanted)[sound].abs() <= (0.51 * scales + 1e-30)[sound, None]).all()
        y = linear_gemm.gemm(x, w, s, None, gain, 1e-5, None, torch.float32, False)
        assert error(y[sound], (found[sound] @ (w.double() * s.double()[:, None]).T)) < 2e-7
        assert not y[~sound].isfinite().any()


def test_programs_that_share_a_tile_sum_in_one_order(monkeypatch):
    monkeypatch.setattr(tuning, "tile", lambda *_: Tile(32, 1, 1, 4, 2, 5))
    x, w, s, *_ = make_case("int8", 19, 64, 1024, DTYPES[-1], False)
    rest = (None, None, 0.0, None, torch.float32, False)
    assert len({tuple(linear_gemm.gemm(x, w, s, *rest).flatten().tolist()) for _ in range(3)}) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "kind,M,N,K,swiglu", [*((kind, 17, 144, 288, True) for kind in KINDS), ("int8", 5, 264, 512, False)]
)
def test_wide(kind, M, N, K, swiglu, dtype, monkeypatch):
    monkeypatch.setattr(linear_wide, "PIECE", 2**15)  # several pieces
    check(linear_wide.wide, make_case(kind, M, N, K, dtype, swiglu), ROUNDED[dtype], 3 * ROUNDED[dtype], swiglu)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("N,K,first,end", [(200, 544, 128, 190)])
def test_widened_weights_are_what_dequantize_makes_of_them(kind, N, K, first, end, dtype):
    w, s, _ = make_weight(kind, N, K, dtype, torch.Generator().manual_seed(2))
    expected = dequantize(w, s, None, dtype)[first:end, :K]
    out = torch.empty(end - first, K, dtype=dtype, device=DEVICE)
    assert torch.equal(linear_wide.widen(*on_device(w, s), first, end, out).cpu(), expected)


SHIPPED = {  # of all files; what is on its way is nothing to the interpreter
    (kind, replace(tile, split=max(tile.split, 1), **({} if CUDA else {"num_stages": 3})))
    for path in tuning.FOLDER.glob("*.json")
    for (kind, _), own in tuning.read_file(path, "gemm")[1].items()
    for tile in own.values()
}


@pytest.mark.parametrize("kind,tile", sorted(SHIPPED, key=repr))
def test_shipped_tiles(kind, tile, monkeypatch):
    monkeypatch.setattr(tuning, "tile", lambda *_: tile)
    dtype, kind = DTYPES[-1], {"int4": "int4:32", "fp": "16-bit"}.get(kind, kind)
    check(linear_gemm.gemm, make_case(kind, 21, 80, 544, dtype, True), exact(kind, dtype), 2 * ROUNDED[dtype], True)


def test_every_weight_finds_a_tile():
    cpu = torch.device("cpu")
    for kind, N, K, M in itertools.product(
        ("fp", "int8", "fp8", "int4"), (8, 576, 4096, 128256), (64, 4096, 28672), (17, 64, 65, 640)
    ):
        if kind == "fp" and M > linear_wide.GEMM_ROWS_PLAIN:
            continue
        tile = tuning.tile(kind, N, K, M, cpu)
        most = 16 * tile.row_repeat * tile.num_warps
        assert 1 <= tile.split <= max(1, K // 1024) and tile.height % 16 == 0 and tile.height <= most
        assert -(-M // tile.rows) * -(-N // (tile.height or most)) <= linear_gemm.TILES


def test_tiles_fill_the_multiprocessors_once_or_twice(monkeypatch):
    """Of two on each of 132, which 256 rows of w13's 28,672 would leave to 224."""
    monkeypatch.setattr(tuning, "tables", lambda *_: ({}, {("int8", 64): {(2, None): Tile(64, 1, 2, 8, 3, 1)}}))
    tuning.tile.cache_clear()
    cpu = torch.device("cpu")
    assert tuning.tile("int8", 28672, 4096, 64, cpu).height == 112
    assert tuning.tile("int8", 2 * 132 * 128, 4096, 64, cpu).height == 128
    assert tuning.tile("int8", 2 * 132 * 128 + 1, 4096, 64, cpu).height == 80  # two of them each
    assert tuning.tile("int8", 28672, 4096, 65, cpu).height == 0  # several tiles read a row of W
    tuning.tile.cache_clear()


@pytest.mark.parametrize("kind", ["16-bit", "int8", "int8, deep", "fp8", "int4:64"])
def test_each_number_of_rows_has_its_way(kind, monkeypatch):
    name = {"16-bit": "GEMM_ROWS_PLAIN", "int8": "GEMM_ROWS_INT8", "int8, deep": "GEMM_ROWS_INT8_DEEP"}
    monkeypatch.setattr(linear_wide, name.get(kind, "GEMM_ROWS"), 20)
    if kind == "int8, deep":
        kind = "int8"
        monkeypatch.setattr(linear_wide, "DEEP", 255)
    ways, calls = {"gemm": linear_gemm.gemm, "wide": linear_wide.wide}, []
    for name, way in ways.items():
        monkeypatch.setattr(linear_wide, name, lambda *rest, n=name, w=way: (calls.append(n), w(*rest))[1])
    monkeypatch.setattr(linear_wide, "on_triton", lambda x: True)
    for rows, way in ((17, "gemm"), (20, "gemm"), (21, "wide"), (40, "wide")):
        x, w, s, dense, gain, bias, residual = make_case(kind, rows, 48, 256, torch.float16, False)
        layer = Linear(256, 48).assign({"weight": dense})
        layer.weight, layer.scales, layer.bias = (
            t if t is None else torch.nn.Parameter(t, False) for t in (w, s, bias)
        )
        layer.backends = (_over_ranks(linear_wide.run),)
        norm = torch.nn.RMSNorm(256, 1e-5)
        norm.weight = torch.nn.Parameter(gain, False)
        y = ops.linear(layer, x[None], norm, residual[None])
        assert error(y[0], plain(x.float(), dense.float(), bias, gain, residual)) < 2e-3
        assert calls.pop() == way and not calls


def test_one_graph_serves_all_numbers_of_rows():
    w, s, dense = on_device(*make_weight("int8", 48, 256, torch.float16, torch.Generator().manual_seed(3)))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    way = torch.compile(
        lambda x: linear_wide.linear_many(x, w, s, None, None, 0.0, None, torch.float32, True) + 1,
        backend=counter, fullgraph=True, dynamic=True,
    )  # fmt: skip
    for rows in (17, 40, 64, 600):
        x = torch.randn(1, rows, 256, device=DEVICE).half()
        expected = plain(x.float(), dense, gate_up=True) + 1
        y = way(x)
        assert y.shape == expected.shape and error(y, expected) < 1e-3
    assert counter.frame_count == 1


@pytest.mark.cuda
@pytest.mark.skipif(not CUDA, reason="shapes of real models take the interpreter minutes")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("M", [17, 33, 100, 200, 700])
def test_many_rows_in_model_shapes(kind, M):
    for N, K, swiglu in ((6144, 4096, False), (4096, 14336, False), (28672, 4096, True), (1536, 576, True)):
        case = make_case(kind, M, N, K, torch.bfloat16, swiglu, seed=M)
        check(linear_wide.linear_many, case, 4e-3, 1e-2, swiglu)
