"""What the interpreter does not tell: that the Triton kernels compile for a GPU, which need not be there, and that
weights, keys and x get from their load to the tensor cores without a detour through shared memory."""

import fcntl
import importlib
import io
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

triton = pytest.importorskip("triton", reason="the kernels need Triton")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    """What `main` prints, without the interpreter, in which the kernels are not even parsed as Triton. Workers of
    pytest-xdist share it: it takes a minute or two."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with (folder / "compiled.json").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        if not (text := file.read()):
            env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
            env |= {"TRITON_CACHE_DIR": str(folder / "cache"), "TRITON_DUMP_PTXAS_LOG": "1"}
            env["PYTHONPATH"] = str(Path(__file__).parents[1])
            process = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
            assert process.returncode == 0, process.stderr[-4000:]
            file.write(text := process.stdout)
    return [json.loads(line) for line in text.splitlines()]


def test_all_kernels_compile_for_hopper(compiled):
    assert {row["kernel"] for row in compiled} == {
        "_linear_kernel",
        "_gemm_kernel",
        "_norm_kernel",
        "_fixed_point_kernel",
        "_widen_kernel",
        "_finish_kernel",
        "_attention_kernel",
        "_rotate_kernel",
        "_flash_kernel",
        "_maxima_kernel",
        "_sample_kernel",
        "_verify_kernel",
        "_copy_match_kernel",
        "_embedding_kernel",
        "_all_reduce_kernel",
        "_exchange_kernel",
        "_route_kernel",
        "_experts_kernel",
        "_widen_cache_kernel",
        *GROUPING,
    }
    # All but the first start when all before has ended.
    others = ("_attention_kernel", "_rotate_kernel", "_flash_kernel", "_widen_cache_kernel", "_exchange_kernel")
    others += GROUPING
    assert all(row["waits"] == row["launches"] > 0 for row in compiled if row["kernel"] not in others)


def test_fragments_are_loaded_as_they_are(compiled):
    """A layout that Triton converts on the way to a product shows as shared memory with a name of its own."""
    linear = [row for row in compiled if row["kernel"] in ("_linear_kernel", "_experts_kernel")]
    assert len(linear) > 20
    assert [row["case"] for row in linear if row["buffers"]] == []


def test_warps_meet_once(compiled):
    """For their sums, and of several rows once more for a norm. What Triton would move between warps on the way shows
    as barriers."""
    rows = [row for row in compiled if row["kernel"] in ("_linear_kernel", "_experts_kernel")]
    rows = [row for row in rows if " rows" in row["case"] and "rank" not in row["case"]]
    assert len(rows) > 20
    for row in rows:
        both = "norm" in row["case"] and ", 1 rows" in row["case"]
        assert len(row["boxes"]) == 1 + ("norm" in row["case"]), row
        assert row["barriers"] == (1 if both else len(row["boxes"])), row


def test_shared_memory_suffices(compiled):
    """What a kernel declares itself and what Triton asks for, which is no more than every kernel may have."""
    rows = [row for row in compiled if row["boxes"]]
    assert {row["kernel"] for row in rows} == {"_linear_kernel", "_experts_kernel", "_attention_kernel"}
    assert [row for row in rows if sum(row["boxes"]) + row["shared"] > 48 * 1024] == []
    assert all(len(set(row["boxes"])) == len(row["boxes"]) for row in rows)  # none is declared where it is used, twice


def test_pairs_are_left_as_tensor_cores_have_them(compiled):
    """What warps.leave_pairs counts on, of one new token and of several."""
    rows = [row for row in compiled if row["paired"]]
    assert {row["case"].split(" ", 1)[0] for row in rows if "tokens" in row["case"]} == {"1", "4"}
    own = r"#ttg\.(nvidia_mma<{versionMajor = 2,|linear<{register = \[\[0, 0, 1\], \[0, [08], 0\],)"
    assert [row["case"] for row in rows if not all(re.match(own, layout) for layout in row["paired"])] == []


def test_gemms_widen_between_shared_memory_and_tensor_cores(compiled):
    """Weights, int4's pairs and x each have a buffer of what is on its way, and need no other; products are the tensor
    cores' own of Hopper, and have ended before the next weights are widened, perhaps into the registers that they read;
    no register is spilled."""
    gemms = [row for row in compiled if row["kernel"] == "_gemm_kernel"]
    assert len(gemms) > 15
    widening = [row for row in compiled if row["kernel"] in ("_gemm_kernel", "_grouped_kernel")]
    assert [row["case"] for row in widening if row["pending"] and "16-bit" not in row["case"]] == []
    assert any(row["pending"] for row in widening)  # of plain weights, which lie in shared memory
    for row in gemms:
        assert row["buffers"] in ((3,) if "int4" in row["case"] else (2, 3) if "groups" in row["case"] else (2,)), row
        assert row["wgmma"] > 0, row["case"]
    assembled = [row for row in compiled if row["assembled"]]  # but for what was compiled for an earlier case
    assert len(assembled) > 15
    for row in assembled:
        assert re.search(r"\b0 bytes spill stores", row["assembled"]), row["case"]
        if "groups" not in row["case"]:  # other programs' layouts, whose scales some products wait for
            assert "serialized" not in row["assembled"], row["case"]


def test_caches_in_8_bits_are_read_as_products_want_them(compiled):
    """In words of 16 bytes, without shuffles between lanes but for sums and maxima."""
    rows = [row for row in compiled if row["kernel"] == "_attention_kernel" and "a cache in" in row["case"]]
    assert len(rows) == 2
    for row in rows:
        assert row["wide_loads"] >= 32 and row["shuffles"] < 110, row


def test_no_kernel_converts_to_fp8(compiled):
    """ptxas 12.8 then may widen a wrong register; see kv_cache.encode."""
    assert any("fp8" in row["case"] and "heads of 64" in row["case"] for row in compiled)
    assert [row["case"] for row in compiled if row["to_fp8"]] == []


def test_every_thread_waits_for_its_own_message(compiled):
    """See messages.receive: a tile of messages whose elements several threads hold."""
    messages = [row for row in compiled if row["messages"]]
    assert {row["kernel"] for row in messages} == {"_all_reduce_kernel", "_linear_kernel"}
    for row in messages:
        for shape, *layout in row["messages"]:
            assert all(n >= math.prod(spans) for n, *spans in zip(shape, *layout)), row["case"]


@pytest.mark.parametrize("shape", [(16384, 2048), (4096, 11008), (4096, 1024), (5504, 4096), (32000, 4096)])
@pytest.mark.parametrize("kind", ["fp", "fp8", "int8", "int4"])
def test_tune_tries_what_the_kernel_uses_as_it_is(kind, shape, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "scripts")
    import tune

    from ops import tuning

    cpu = torch.device("cpu")
    N, K = shape
    names = {"int4": "int32", "int8": "int8", "fp8": "float8_e4m3fn", "fp": "half"}
    shape, dtype = (N // 8, K // 128, 8, 4, 4) if kind == "int4" else shape, names[kind]
    weight = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
    choices = tune.candidates(weight, K, 132)
    assert 20 < len(set(choices)) == len(choices) < 650
    own, _ = tuning.tables(cpu)
    for choice in choices:
        monkeypatch.setitem(own, tuning.key(kind, 1), {(N, K): choice})
        assert tuning.configuration(kind, N, K, 1, cpu) == choice
        assert kind not in ("fp", "fp8") or tuning.CHUNK[kind] * choice.k_repeat <= 256  # see linear_triton's X


def test_tune_finds_what_is_best_together(monkeypatch):
    """Neither of two choices is better by itself, nor attention without prefetch; another layer's does not matter."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "scripts")
    import tune

    shipped, good, bad = (tune.Configuration(rows, 1, 4, 128, 1) for rows in (16, 32, 64))
    alone = replace(good, no_prefetch=True)

    def measure(tried):
        wo, w13 = tried.get("wo", shipped), tried.get("w13", shipped)
        cost = {(alone, good): 8, (good, good): 9, (shipped, shipped): 10}
        return cost.get((wo, w13), 11) + 2 * (tried.get("w2", shipped) != bad)

    choices = {"wo": [shipped, good, bad], "w13": [shipped, good, bad], "w2": [bad, good]}
    assert tune.search(choices, measure, True, 1) == (12, 10, {"w2": bad})  # from what is shipped alone
    assert tune.search(choices, measure, True, 30) == (12, 8, {"wo": alone, "w13": good, "w2": bad})
    assert tune.search(choices, measure, False, 30) == (12, 9, {"wo": good, "w13": good, "w2": bad})


@pytest.mark.parametrize("dim,hidden,lines", [(2048, 16384, 0), (4096, 22016, 2**14)])
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
def test_a_layer_behind_attention_may_want_no_prefetch(monkeypatch, dtype, dim, hidden, lines):
    """That of Llama 3.2 1B on an H200, for one row; that of 7B does not mind."""
    from ops import common

    attention = importlib.import_module("ops.attention")  # the package has the function by that name
    monkeypatch.setattr(common, "gpu", lambda device: common.Gpu("NVIDIA H200", (9, 0), 132))
    monkeypatch.setattr(attention, "on_triton", lambda x: x.is_meta)
    weight, soon = (torch.empty(n, dim, dtype=dtype, device="meta") for n in (dim, hidden))
    scales = torch.empty(dim, device="meta") if dtype is torch.int8 else None
    layer = SimpleNamespace(wo=SimpleNamespace(weight=weight, scales=scales, in_features=dim))
    attention.prepare(layer, True, soon, None)
    assert layer.prefetch is soon and layer.prefetch_lines == (lines, 2**14)


def test_what_is_tuned_for_a_gpu_serves_it_by_any_name(monkeypatch):
    from ops import common, tuning

    monkeypatch.setattr(common, "gpu", lambda device: common.Gpu("NVIDIA H200", (9, 0), 132))
    own, _ = tuning.tables(torch.device("cuda"))
    assert own is tuning.tables(torch.device("cuda:0"), "linear")[0]
    choice = tuning.Configuration(16, 2, 8, 96, 2)
    monkeypatch.setitem(own, tuning.key("int8", 1), {(4096, 4096): choice})
    assert tuning.configuration("int8", 4096, 4096, 1, torch.device("cuda:0")) == choice


GROUPING = ("_choose_kernel", "_place_kernel", "_grouped_kernel", "_sum_kernel")  # of experts' tokens


def volatile_loads(ttgir: str) -> list[list[list[int]]]:
    """Of each volatile load: its shape, and how many elements a thread, the threads of a warp and the warps span."""
    layouts = dict(re.findall(r"^(#\w+) = #ttg.blocked<(.*)>$", ttgir, re.M))
    loads = re.findall(r"isVolatile = true} : tensor<([\dx]+)x!tt.ptr<i64>, (#\w+)>", ttgir)
    spans = {name: [json.loads(part) for part in re.findall(r"\[.*?\]", layouts[name])[:3]] for _, name in loads}
    return [[[int(n) for n in shape.split("x")], *spans[name]] for shape, name in loads]


def pairs_layouts(ttgir: str) -> list[str]:
    """The layouts of what is stored in shared memory in pairs."""
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\.\w+<.*>)$", ttgir, re.M))
    return [layouts[name] for name in re.findall(r"st\.shared\.v2.*tensor<\w+, (#\w+)>\s", ttgir)]


def empty_weight(kind: str, N: int, K: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A weight and its scales as the kernels read them."""
    from ops.packing import pack_int4, pack_mxfp4

    if kind == "mxfp4":
        return pack_mxfp4(*(torch.zeros(N, K // of, dtype=torch.uint8) for of in (2, 32)))
    if kind.startswith("int4"):
        group = int(kind[5:])
        K4 = -(-K // group) * group
        scales = torch.ones(N, K4 // group, dtype=torch.bfloat16)
        return pack_int4(torch.zeros(N, K4 // 2, dtype=torch.uint8), scales, scales)
    of = {"16-bit": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[kind]
    return torch.empty(N, K, dtype=of), None if kind == "16-bit" else torch.empty(N, dtype=torch.bfloat16)


def grouped_weights(N: int, K: int) -> list[tuple[torch.Tensor, torch.Tensor, str]]:
    """Weights of other programs' files and their scales, as the kernels read them."""
    from ops.packing import pack_grouped, pack_int4

    half = torch.ones(N, K // 32, dtype=torch.float16)
    e4m3, int8 = (torch.empty(N, K, dtype=of) for of in (torch.float8_e4m3fn, torch.int8))
    return [
        (*pack_int4(torch.zeros(N, K // 2, dtype=torch.uint8), half, half), "int4 with scales in fp16"),
        (e4m3, torch.ones(N, K // 128), "fp8 in blocks"),
        (int8, torch.ones(N, K // 16, dtype=torch.float16), "int8 of 16"),
        (int8, pack_grouped(half, half), "int8 with zeros"),
        (*empty_weight("mxfp4", N, K), "mxfp4"),
    ]


def pending(ptx: str) -> int:
    """Groups of products that may still run when a loop begins anew."""
    loops = re.findall(r"^(\$L\w+):(.*?)bra(?:\.uni)?\s+\1;", ptx, re.S | re.M)
    waits = [re.findall(r"wgmma\.wait_group\.sync\.aligned\s+(\d+)", body) for _, body in loops]
    return max((int(found[-1]) for found in waits if found), default=0)


def main() -> None:
    """Compile each kernel for sm_90 by its own launcher, with a driver that only says so, and print what came out."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
    import tune
    from compile_only import compile_only  # first, as it imports Triton

    from ops import (
        exchange,
        experts_choice,
        experts_gemm,
        experts_triton,
        kv_cache,
        linear_gemm,
        linear_triton,
        linear_wide,
        ngram,
        sampling,
        symmetric,
        tuning,
    )
    from ops.attention_triton import attention_triton
    from ops.embedding import embedding_triton
    from ops.prefill import attention_prefill
    from ops.tuning import Configuration, Tile
    from ops.verify import verify_triton
    from tp import TensorParallel

    case, log = "", io.StringIO()  # what the assembler says of a kernel, which Triton prints

    def found(name, asm):
        row = {
            "kernel": name,
            "case": case,
            "messages": volatile_loads(asm["ttgir"]),
            "buffers": asm["ttgir"].count("ttg.local_alloc"),
            "barriers": asm["ptx"].count("bar.sync"),
            "boxes": [4 * int(words) for words in re.findall(r"\.b32 box\[(\d+)\]", asm["ptx"])],
            "shared": asm["shared"],
            "waits": asm["ptx"].count("griddepcontrol.wait"),
            "pending": pending(asm["ptx"]),
            "wgmma": asm["ptx"].count("wgmma.mma_async"),
            "assembled": log.getvalue() if name in ("_gemm_kernel", "_widen_kernel") else "",
            "launches": asm["ptx"].count("griddepcontrol.launch_dependents"),
            "shuffles": asm["ptx"].count("shfl.sync"),
            "paired": pairs_layouts(asm["ttgir"]),
            "to_fp8": asm["ptx"].count(".e4m3x2.f32"),
            "wide_loads": len(re.findall(r"ld\.global\.cg\.v4\.b32", asm["ptx"])),
        }
        print(json.dumps(row), file=sys.__stdout__)
        log.seek(log.truncate(0))

    compile_only(found)
    sys.stdout = log

    dtype, N, K = torch.bfloat16, 4096, 2112
    for kind in ("16-bit", "int8", "fp8", "int4:32", "int4:128"):
        w, s = empty_weight(kind, N, K)
        for rows in (1, 6) if kind in ("int8", "fp8") else (1, 6, 16):
            x, gain, residual = (torch.empty(*shape, dtype=dtype) for shape in ((rows, K), (K,), (rows, N)))
            case = f"{kind}, {rows} rows, a residual"
            linear_triton.linear(x, w, s, residual=residual)
            case = f"{kind}, {rows} rows, a norm and SwiGLU"
            linear_triton.linear(x, w, s, None, gain, 1e-5, swiglu=True)
    for kind in ("int8", "int4:32"):
        case = f"{kind}, 1 rows, a norm, in turns"
        x, gain = torch.empty(1, K, dtype=dtype), torch.empty(K, dtype=dtype)
        with patch.object(tuning, "configuration", lambda *_: tuning.Configuration(16, 2, 4, 168, 1)):
            linear_triton.linear(x, *empty_weight(kind, 128 * N, K), None, gain, 1e-5)
    files = [tuning.read_file(path, "gemm")[1] for path in tuning.FOLDER.glob("*.json")]
    tiles = {(of, replace(tile, split=1)) for table in files for (of, _), own in table.items() for tile in own.values()}
    kinds = {"int4": "int4:32", "fp": "16-bit"}
    tiles = [(kinds.get(kind, kind), tile, 2048) for kind, tile in sorted(tiles, key=repr)]
    tiles += [(kind, Tile(64, 1, 1, 4, 4, 2), 2112) for kind in ("fp8", "int4:128")]
    for case, tile, K in tiles:
        tuning.tile = lambda *_, tile=tile: tile
        x, gain, bias, residual = (torch.empty(*n, dtype=dtype) for n in ((40, K), (K,), (N,), (40, N // 2)))
        linear_gemm.gemm(x, *empty_weight(case, N, K), bias, gain, 1e-5, residual, dtype, True)
    for w, s, name in grouped_weights(N, 2048):
        case = f"groups, {name}"
        tuning.tile = lambda *_: Tile(64, 1, 1, 4, 4, 2)
        x, gain = torch.empty(40, 2048, dtype=dtype), torch.empty(2048, dtype=dtype)
        linear_gemm.gemm(x, w, s, None, gain, 1e-5, None, dtype, True)
        linear_wide.widen(w, s, 0, N, torch.empty(N, 2048, dtype=dtype))
        for rows in (1, 6, 16):
            linear_triton.linear(x[:rows], w, s, None, gain, 1e-5, swiglu=True)
    for case in ("int8", "fp8", "int4:32", "int4:128"):
        linear_wide.widen(*empty_weight(case, N, 2048), 0, N, torch.empty(N, 2048, dtype=dtype))
    case, x, gain = "what comes after a product", torch.empty(40, K, dtype=dtype), torch.empty(K, dtype=dtype)
    linear_wide.wide(x, torch.empty(N, K, dtype=dtype), None, bias, gain, 1e-5, residual, dtype, True)
    w, x, gain = (
        torch.empty(32000, 4096, dtype=dtype),
        torch.empty(1, 4096, dtype=dtype),
        torch.empty(4096, dtype=dtype),
    )
    case = "programs of several tiles"
    linear_triton.linear(x, w, None, None, gain, 1e-5, out_dtype=torch.float32)
    case = "programs of several tiles, a step for all of K"
    linear_triton.linear(x[:, :2048], w[:, :2048].to(torch.int8).contiguous(), torch.empty(32000, dtype=dtype))

    C, size, E, k = 2048, 768, 8, 2
    board = experts_choice.scoreboard(torch.device("cpu"), E)
    for kind, rows in (("16-bit", 1), ("mxfp4", 1), ("mxfp4", 6), ("int4:32", 6)):
        case, slots = f"experts of {kind}, {rows} rows", min(E, rows * k)
        up, down = empty_weight(kind, E * 2 * size, C), empty_weight(kind, E * C, size)
        x, used, weights = torch.empty(rows, C, dtype=dtype), torch.zeros(1 + slots).int(), torch.zeros(slots, rows)
        choice = (0.0, 1.0, board, True) if rows == 1 else ()
        hidden = experts_triton.experts(x, *up, None, E, used, weights, None, False, *choice)
        experts_triton.experts(hidden, *down, None, E, used, weights, x, True, *choice)
    case, gate = "a router", torch.empty(E, C, dtype=dtype)
    experts_triton.route(x, torch.empty(rows, E), x, gate[0], 1e-5, gate, None, k, True)
    experts_triton.route(x[:1], board, x[:1], gate[0], 1e-5, gate, None, k, True)
    case, x = "many rows of experts", torch.empty(600, C, dtype=dtype)
    experts_gemm.mixture_many(x, gate[0], 1e-5, gate, None, k, True, 0.0, 1.0, *up, None, *down, None, x)

    buffers = counts = torch.zeros(2, dtype=torch.int64)
    symmetric.symmetric_buffers = lambda device: (None, (buffers, counts))
    for rows, world in ((1, 2), (6, 4)):
        case = f"a sum over ranks, {rows} rows"
        x = torch.empty(rows, 2048, dtype=dtype)
        linear_triton.linear(
            x, w[:4096, :2048].contiguous(), residual=torch.empty(rows, 4096, dtype=dtype), world=world
        )
        case = f"ranks' parts side by side, {rows} rows"
        linear_triton.linear(x, w[:4096, :2048].contiguous(), norm=gain[:2048], eps=1e-5, world=world, gather=True)
    for name in ("wqkv", "wo", "w13", "w2", "output"):
        case, of = f"tune.py's {name}", ((256, 2048), dtype)
        tune.compile_layer(name, of, None, 2048, 6, TensorParallel(0, 2), Configuration(16, 2, 4, 128, 0))
    symmetric.all_reduce_triton(x, False, 0, 2, buffers, counts)
    symmetric.all_reduce_triton(x, True, 1, 4, buffers, counts)
    x = torch.empty(70000, dtype=dtype)
    exchange.sum_triton(x, x, x, buffers, counts.int(), 1, 2)

    pos = torch.zeros(1, dtype=torch.int64)
    for S, H, Hkv, D, rotary in (
        (1, 4, 4, 128, True),
        (1, 8, 2, 64, True),
        (6, 4, 2, 128, True),
        (4, 4, 2, 16, False),
        (1, 8, 2, 128, False),
        (1, 8, 1, 128, False),
        (1, 4, 1, 256, False),
    ):
        case = f"{S} tokens, {H} heads of {D}, {Hkv} keys{', rope' if rotary else ''}"
        qkv, cache = torch.empty(1, S, (H + 2 * Hkv) * D, dtype=dtype), torch.empty(2, 1, Hkv, 1024, D, dtype=dtype)
        rope, norm = (torch.empty(1024, D // 2, 2), torch.empty(D, dtype=dtype)) if rotary else (None, None)
        scores = (None, 0.0, None) if rotary else (0.1, 5.0, torch.empty(H, dtype=dtype))
        attention_triton(qkv, *cache, pos, rope, norm, norm, 1e-5, H, 0, *scores, None if rotary else qkv)
        attention_prefill(qkv, *cache, pos, rope, norm, norm, 1e-5, H, 0, *scores)
    for kind in kv_cache.DTYPES:
        case = f"a cache in {kind}"
        qkv, cache = torch.empty(1, 1, 6 * 128, dtype=dtype), kv_cache.allocate((1, 1, 1024, 128), dtype, kind, "cpu")
        attention_triton(qkv, *cache[:2], pos, None, None, None, 0.0, 4, 0, None, 0.0, None, *cache[2:])
        case = f"heads of 64, keys and values in {kind}"
        small = torch.empty(1, 1, 6 * 64, dtype=dtype), *kv_cache.allocate((1, 1, 1024, 64), dtype, kind, "cpu")
        attention_triton(*small[:3], pos, None, None, None, 0.0, 4, 0, None, 0.0, None, *small[3:])
    for kind in (None, *kv_cache.DTYPES):
        case = f"many rows, keys and values in {kind}"
        of_many = torch.empty(400, 1, 6 * 128, dtype=dtype), *kv_cache.allocate((400, 1, 32, 128), dtype, kind, "cpu")
        attention_triton(*of_many[:3], pos, None, None, None, 0.0, 4, 0, None, 0.0, None, *of_many[3:])
    attention_prefill(qkv, *cache[:2], pos, None, None, None, 0.0, 4, 0, None, 0.0, None, *cache[2:])

    case, rng, history = "", torch.zeros(2, dtype=torch.int64), torch.zeros(1, 64, dtype=torch.int64)
    logits = torch.zeros(12, 32000)
    sampling.sample_triton(logits[:1], 0.8, 200, 0.0, rng, history, pos)
    sampling.sample_triton(logits[:1], 0.8, 0, 0.0, rng)
    sampling.logit_threshold_triton(logits, 0.8, 200, 0.1)
    verify_triton(logits[:11], logits[:11, :1], history[:, :5].contiguous(), 0.8, rng)
    ngram.copy_match_triton(history, pos, 5)
    embedding_triton(torch.empty(40, 72, dtype=dtype), history, pos, 1)
    embedding_triton(torch.empty(40, 72, dtype=dtype), history, None, 8, 20)


if __name__ == "__main__":
    main()
