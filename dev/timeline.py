# ruff: noqa
"""Where a step's time goes: python timeline.py MODEL:MODE [layers]; cwd is the tree. Patches a copy of ops/ with stamps of the
GPU's timer: a kernel's start, the wait's end, x's arrival, the first and last weights' arrival, the end of each program."""

import os, shutil, sys, tempfile
from pathlib import Path

tree = Path(os.getcwd())
copy = Path(tempfile.mkdtemp())
for name in os.listdir(tree):
    if name.endswith(".py"):
        shutil.copy(tree / name, copy)
for name in ("ops", "scripts", "formats", "process"):
    shutil.copytree(tree / name, copy / name)


def patch(name, *pairs):
    text = (copy / name).read_text()
    for old, new in pairs:
        assert text.count(old) >= 1, (name, old)
        text = text.replace(old, new, 1)
    (copy / name).write_text(text)


(copy / "ops/stamps.py").write_text('''
import torch, triton, triton.language as tl
MOST, POINTS = 2048, 8
memory, names = [], []
def place(name, programs):
    if not memory: return None
    names.append((name, programs))
    return memory[0][(len(names) - 1) * MOST * POINTS :]
@triton.jit
def now(x, to, k: tl.constexpr, FIRST: tl.constexpr = False):
    """x, and thread 0's time when it has it."""
    if to is not None:
        pid = tl.program_id(0) + tl.num_programs(0) * (tl.program_id(1) + tl.num_programs(1) * tl.program_id(2))
        at = to.to(tl.int64) + (pid * 8 + k) * 8
        if FIRST:
            x = tl.inline_asm_elementwise("{ .reg .pred p; .reg .u64 c; .reg .u32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; mov.u64 c, %globaltimer; @p red.global.min.u64 [$2], c; mov.b32 $0, $1; }", "=r,r,l", [x, at], tl.int32, is_pure=False, pack=1)
        else:
            x = tl.inline_asm_elementwise("{ .reg .pred p; .reg .u64 c; .reg .u32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; @p mov.u64 c, %globaltimer; @p st.global.u64 [$2], c; mov.b32 $0, $1; }", "=r,r,l", [x, at], tl.int32, is_pure=False, pack=1)
    return x
''')
MUL = "acc = products.multiply(acc, w_now, s_now, b, x_scale, KIND, GROUP, PAIRS, S, R, C, W, COLS, ASM)"
patch(
    "ops/linear_triton.py",
    ("from ops import symmetric, tuning", "from ops import stamps, symmetric, tuning\nfrom ops.stamps import now"),
    (
        "y, x, w, s, bias, norm, residual, buffers, counts, rank, M, N, K, eps,",
        "y, x, w, s, bias, norm, residual, buffers, counts, stamp, rank, M, N, K, eps,",
    ),
    (
        "        if PDL:\n            tlx.gdc_launch_dependents()\n",
        "        begun = now(tile, stamp, 0)\n        if PDL:\n            tlx.gdc_launch_dependents()\n",
    ),
    (
        "            tlx.gdc_wait()\n\n        PART",
        "            tlx.gdc_wait()\n        begun = now(tile, stamp, 1)\n\n        PART",
    ),
    (
        "        t = products.load(xs, at_x, 0, kx < K // 2, EVEN)\n        squares",
        "        t = now(products.load(xs, at_x, 0, kx < K // 2, EVEN), stamp, 2)\n        squares",
    ),
    (
        "            " + MUL + "\n            tile +=",
        "            " + MUL + "\n            acc = now(acc.to(tl.int32, bitcast=True), stamp, 4).to(tl.float32, bitcast=True)\n            tile +=",
    ),
    (
        "            if WORLD > 1:\n                tl.debug_barrier()  # every",
        "            begun = now(tile, stamp, 5)\n            if WORLD > 1:\n                tl.debug_barrier()  # every",
    ),
    (
        "*(buffers[1] if buffers else (None, None)), rank,",
        "*(buffers[1] if buffers else (None, None)), stamps.place(f'linear {N}x{K}', programs), rank,",
    ),
)
patch(
    "ops/attention_triton.py",
    ("from ops import kv_cache,", "from ops import stamps\nfrom ops.stamps import now\nfrom ops import kv_cache,"),
    ("partial, counts,\n        prefetch,", "partial, counts, stamp,\n        prefetch,"),
    (
        "        block = tl.program_id(2)\n        b = head",
        "        block = tl.program_id(2)\n        begun = now(head, stamp, 0)\n        b = head",
    ),
    (
        "        if PDL:\n            tlx.gdc_wait()\n\n        # All",
        "        if PDL:\n            tlx.gdc_wait()\n        begun = now(head, stamp, 1)\n\n        # All",
    ),
    (
        "        last = last[None, :, None]\n        for t0",
        "        begun = now(begun, stamp, 3)\n        last = last[None, :, None]\n        for t0",
    ),
    (
        "        m, l = tl.reduce((m_i, l_i), 0, _together)\n",
        "        m_i = now(m_i.to(tl.int32, bitcast=True), stamp, 4).to(tl.float32, bitcast=True)\n        m, l = tl.reduce((m_i, l_i), 0, _together)\n",
    ),
    ("mask=mask)\n\n\n# Bytes", "mask=mask)\n            begun = now(head, stamp, 5)\n\n\n# Bytes"),
    (
        "        counters(qkv.device, groups), prefetch, lines,",
        "        counters(qkv.device, groups), stamps.place('attention', B * Hkv * programs * blocks), prefetch, lines,",
    ),
)
TIMES = "acc = _times(acc, w_now, s_now, b, x_scale, KIND, GROUP, PAIR, R, C, W, COLS, DOWN, ASM)"
patch(
    "ops/experts_triton.py",
    (
        "    from ops.linear_triton import _axes, bytes_of\n",
        "    from ops import stamps\n    from ops.linear_triton import _axes, bytes_of\n    from ops.stamps import now\n",
    ),
    ("h, logits, used, weights, done, x, gain,", "h, logits, used, weights, done, stamp, x, gain,"),
    (
        "        e, c = block * BE + tl.arange(0, BE), tl.arange(0, BC)\n",
        "        e, c = block * BE + tl.arange(0, BE), tl.arange(0, BC)\n        begun = now(block, stamp, 0)\n",
    ),
    (
        "            tlx.gdc_wait()\n        row = tl.load",
        "            tlx.gdc_wait()\n        begun = now(block, stamp, 1)\n        row = tl.load",
    ),
    (
        "        if ROWS == 1:\n            return",
        "        if ROWS == 1:\n            begun = now(block, stamp, 5)\n            return",
    ),
    (
        "        tl.debug_barrier()\n        if tl.atomic_add(done",
        "        begun = now(block, stamp, 4)\n        tl.debug_barrier()\n        if tl.atomic_add(done",
    ),
    (
        "        tl.store(weights + e * M + rows, 0.0, (e >= count) & (e < S) & (rows < M))\n",
        "        tl.store(weights + e * M + rows, 0.0, (e >= count) & (e < S) & (rows < M))\n        begun = now(block, stamp, 5)\n",
    ),
    (
        "h, logits, used, weights, counters(x.device, 1), x, norm,",
        "h, logits, used, weights, counters(x.device, 1), stamps.place('route', triton.cdiv(E, BE) * M), x, norm,",
    ),
    (
        "y, x, w, s, bias, residual, used, weights, logits, E, S, M, N, K, KIND",
        "y, x, w, s, bias, residual, used, weights, logits, stamp, E, S, M, N, K, KIND",
    ),
    (
        "        tile = tl.program_id(0)\n        if PDL:\n            if DOWN:",
        "        tile = tl.program_id(0)\n        begun = now(tile, stamp, 0)\n        if PDL:\n            if DOWN:",
    ),
    (
        "            if PDL:\n                tlx.gdc_wait()\n            t = _rows(",
        "            if PDL:\n                tlx.gdc_wait()\n            begun = now(tile, stamp, 1)\n            t = _rows(",
    ),
    (
        "        if not DOWN:\n            t = _rows(",
        "        if not DOWN:\n            begun = now(tile, stamp, 1)\n            t = _rows(",
    ),
    (
        "            expert = _expert(used, slots, indices, tile // T)\n",
        "            expert = now(_expert(used, slots, indices, tile // T).to(tl.int32), stamp, 3).to(tl.int64)\n",
    ),
    (
        "            slots, indices, scores = _chosen(logits, E, TOP, EXPERTS, W)\n",
        "            slots, indices, scores = _chosen(logits, E, TOP, EXPERTS, W)\n            slots = now(slots, stamp, 2)\n",
    ),
    (
        "            " + TIMES + "\n            tile +=",
        "            " + TIMES + "\n            acc = now(acc.to(tl.int32, bitcast=True), stamp, 4).to(tl.float32, bitcast=True)\n            tile +=",
    ),
    (
        '            tl.store(y + at, out.to(y.dtype.element_ty), mask=stored)\n\n\n@op("route"',
        '            tl.store(y + at, out.to(y.dtype.element_ty), mask=stored)\n            begun = now(tile, stamp, 5)\n\n\n@op("route"',
    ),
    (
        "bias, residual, used, weights, logits, n, S, M, N, K,\n        KIND=kind, GROUP=group_of",
        "bias, residual, used, weights, logits, stamps.place('down' if down else 'up', programs), n, S, M, N, K,\n        KIND=kind, GROUP=group_of",
    ),
)
sys.path[:0] = [str(copy), str(copy / "scripts")]
from dataclasses import replace
import bench, torch
from model import ModelConfig
from ops import stamps

if len(sys.argv) > 1 and sys.argv[1] == "compile_only":
    from compile_only import compile_only

    compile_only(lambda n, a: print(n, len(a["cubin"])), "NVIDIA H200")
    import ops.linear_triton as lt
    from ops import attention_triton as at, kv_cache

    bf = torch.bfloat16
    stamps.memory.append(torch.zeros(10**6, dtype=torch.int64))
    for N, K, n in ((4096, 4096, 0), (12288, 4096, 1)):
        lt.linear(
            torch.empty(1, K, dtype=bf),
            torch.empty(N, K, dtype=torch.int8),
            torch.empty(N, dtype=bf),
            norm=torch.empty(K, dtype=bf) if n else None,
            residual=None if n else torch.empty(1, N, dtype=bf),
        )
        lt.linear(
            torch.empty(1, K, dtype=bf),
            torch.empty(N, K, dtype=bf),
            norm=torch.empty(K, dtype=bf) if n else None,
            residual=None if n else torch.empty(1, N, dtype=bf),
        )
    c = kv_cache.allocate((1, 8, 400, 128), bf, None, "cpu")
    at.attention_triton(
        torch.empty(1, 1, 48 * 128, dtype=bf),
        *c[:2],
        torch.zeros(1, dtype=torch.int64),
        torch.empty(400, 64, 2),
        None,
        None,
        1e-5,
        32,
        0,
        None,
        0.0,
        None,
        *c[2:],
        first_layer=False,
    )
    from ops import experts_triton as et, packing

    C, E, k, H = 2048, 128, 8, 768
    x, g, gate = torch.empty(1, C, dtype=bf), torch.empty(C, dtype=bf), torch.empty(E, C, dtype=bf)
    et.route(torch.empty_like(x), torch.empty(1, E), x, g, 1e-6, gate, None, k, True)
    used, wt = torch.empty(1 + k, dtype=torch.int32), torch.empty(k, 1)
    for N, down in ((2 * H, False), (C, True)):
        K = H if down else C
        w, sc = packing.pack_4_bits(
            torch.zeros(E * N, K // 2, dtype=torch.uint8),
            torch.zeros(E * N, K // 32, dtype=bf),
            torch.zeros(E * N, K // 32, dtype=bf),
        )
        et.experts(torch.empty(k, 1, H, dtype=bf) if down else x, w, sc, None, E, used, wt, x if down else None, down, 0.0, 1.0, None if down else torch.empty(1, E), True)
    sys.exit()
device = torch.device("cuda")
for job in sys.argv[1:]:
    name, mode = job.split(":", 1)
    config = ModelConfig.from_name(name)
    with torch.inference_mode():
        model = bench.random_model(config, mode, device, torch.bfloat16)
        cache = model.cache(1, 400, None)
        tokens = torch.ones(1, int(os.environ.get("ROWS", 1)), dtype=torch.int64, device=device)
        pos = torch.full((1,), 200, dtype=torch.int64, device=device)
        model(tokens, pos, cache, all_logits=True)
        plain = bench.step_time(model, tokens.shape[1], 400)
        stamps.memory[:] = [torch.zeros(400 * stamps.MOST * stamps.POINTS, dtype=torch.int64, device=device)]
        stamps.names.clear()
        model(tokens, pos, cache, all_logits=True)
        stamps.names.clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model(tokens, pos, cache, all_logits=True)
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(11)]
        for m in marks:
            graph.replay()
            m.record()
        torch.cuda.synchronize()
        stamped = sorted(a.elapsed_time(b) * 1e3 for a, b in zip(marks, marks[1:]))[5]
        memory = stamps.memory[0].view(-1, stamps.MOST, stamps.POINTS)
        per = len(stamps.names) // config.n_layer
        rows = {}
        for _ in range(20):
            memory.zero_()
            torch.cuda.synchronize()
            graph.replay()
            torch.cuda.synchronize()
            found, before = memory.cpu(), None
            for i, (kind, programs) in enumerate(stamps.names):
                t = found[i, :programs].double()
                t = t[t[:, 5] > 0]
                if before is not None and len(t) and i > 2 * per:
                    s = (t - before) / 1e3
                    s[t == 0] = float("nan")
                    line = []
                    for k in (0, 1, 2, 3, 4, 5):
                        v = s[:, k][~s[:, k].isnan()]
                        line += [v.min(), v.median(), v.max()] if len(v) else [torch.tensor(float("nan"))] * 3
                    rows.setdefault((i % per if i < per * config.n_layer else i, kind, programs), []).append(torch.stack([torch.as_tensor(v) for v in line]))
                if len(t):
                    before = t[:, 5].max()
    print(f"{job}: {plain * 1e6:.0f} us a step, {stamped:.0f} with stamps; means over layers and replays, us since the kernel before has ended (its last program); first, median and last program")
    print("kernel                programs | start | wait over | x there | before the keys | sums | end", flush=True)
    for (_, kind, programs), values in sorted(rows.items()):
        m = torch.stack(values).mean(0).view(-1, 3).tolist()
        print(f"{kind:22} {programs:6} {len(values):4} | " + " | ".join(" ".join(f"{v:6.2f}" for v in three) for three in m), flush=True)
    del model
    bench.release(device)
