# ruff: noqa
"""One launch for a feed-forward and the next layer's first linear, of one row: w13 (norm, SwiGLU), w2 (residual), wqkv (norm).
Persistent programs; the weights of a layer's first tile are asked for before all programs meet for the layer before.

chain.py test | compile | run MODEL:KIND...      (test: the interpreter, phase by phase)
"""
import os, sys
what = sys.argv[1] if len(sys.argv) > 1 else "test"
if what == "test": os.environ["TRITON_INTERPRET"] = "1"
if what == "compile": os.environ["TRITON_INTERPRET"] = "0"
tree = os.environ.get("TREE", os.getcwd()); sys.path[:0] = [tree, tree + "/scripts", tree + "/tests"]
found = []
if what == "compile":
    from compile_only import compile_only
    import re, subprocess, tempfile
    B_ = os.path.join(os.path.dirname(__import__("triton").__file__), "backends/nvidia/bin/")
    def on(name, asm):
        f = tempfile.NamedTemporaryFile(suffix=".cubin"); f.write(asm["cubin"]); f.flush()
        u = subprocess.run([B_ + "cuobjdump", "-res-usage", f.name], capture_output=True, text=True).stdout
        sass = subprocess.run([B_ + "nvdisasm", "-c", f.name], capture_output=True, text=True).stdout
        ops_ = [l for l in sass.splitlines() if re.match(r"\s+/\*[0-9a-f]{4,}\*/", l)]
        c = lambda p: sum(bool(re.search(p, l)) for l in ops_)
        print(name, "REG", re.search(r"REG:(\d+)", u)[1], "STACK", re.search(r"STACK:(\d+)", u)[1], "n", len(ops_), "bar", c(r"BAR\.SYNC"), "smem", asm["shared"], flush=True)
    compile_only(on, "NVIDIA H200")
import torch
from ops import linear_products as products
from ops import linear_triton as L
from ops import tuning, warps
from ops.common import counters, pdl, tl, tlx, triton

MEET = tl.constexpr(
    "{ .reg .pred p; .reg .b32 t, v; mov.u32 t, %tid.x; setp.ne.u32 p, t, 0; @p bra done; "
    "again: ld.acquire.gpu.global.u32 v, [$1]; setp.eq.u32 p, v, $2; @p bra again; done: mov.u32 $0, 0; }"
)
_weights, _rows_of, _axes, _place = L._weights, L._rows_of, L._axes, L._place


@triton.jit
def _arrive(state, programs):
    """Say that this program's results are there. Returns which meeting it is."""
    turn = tl.load(state + 1, volatile=True)
    tl.debug_barrier()
    if tl.atomic_add(state, 1, sem="acq_rel") == programs - 1:
        tl.store(state, 0)
        tl.debug_barrier()
        tl.atomic_add(state + 1, 1, sem="release")
    return turn


@triton.jit
def _meet(state, turn):
    """Wait until all programs have arrived."""
    tl.inline_asm_elementwise(MEET, "=r,l,r", [(state + 1).to(tl.int64), turn], tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()


@triton.jit
def _first(w, s, tile, T, N, K: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, PAIRS: tl.constexpr, SWIGLU: tl.constexpr, R: tl.constexpr, C: tl.constexpr, W: tl.constexpr):
    STEP: tl.constexpr = W * C * (32 if KIND == "fp" else 128 if KIND == "int4" else 64)
    first, stop = _rows_of(tile, T, N, R, 2 if SWIGLU else 1, 0)
    w_now, s_now = _weights(w, s, first, stop, 0, N, K, KIND, GROUP, PAIRS, 1, R, C, W, K % STEP == 0, True, 0)
    return w_now, s_now


@triton.jit
def _phase(
    y, x, w, s, norm, residual, T, N, end, eps, w_now, s_now, nw, ns, nT, nN, state, turn_of,
    K: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, PAIRS: tl.constexpr, SWIGLU: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, TURNS: tl.constexpr, NK: tl.constexpr, NSWIGLU: tl.constexpr, NR: tl.constexpr,
    NC: tl.constexpr, LAST: tl.constexpr, FIRST: tl.constexpr, W: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
    ALONE: tl.constexpr, NUMBER: tl.constexpr,
):
    FOUR: tl.constexpr = KIND == "int4"
    P: tl.constexpr = 2 if KIND == "fp" else 8 if FOUR else 4
    CHUNK: tl.constexpr = 16 * P
    STEP: tl.constexpr = W * C * CHUNK
    EVEN: tl.constexpr = K % STEP == 0
    WHOLE: tl.constexpr = STEP >= K
    X: tl.constexpr = C * CHUNK // 32
    DTYPE: tl.constexpr = x.dtype.element_ty
    IN_INT8: tl.constexpr = KIND != "fp"
    UNIT: tl.constexpr = products.unit(KIND, False, IN_INT8, ASM)
    S: tl.constexpr = s.dtype.element_ty if GROUP > 0 else None
    j, i, warp, _, u = _axes(W, R)
    if IN_INT8:
        PARTS: tl.constexpr = 4 if X > 4 else X
        part = tl.minimum(i // 2, PARTS - 1) + tl.arange(0, X // PARTS)[None, None, None, None, :, None] * PARTS
    else:
        part = tl.minimum(i, X - 1)
    if P == 4:
        kx = warp * (C * CHUNK // 2) + (part // 2) * 32 + j * 8 + (part % 2) * 4 + u
    else:
        kx = warp * (C * CHUNK // 2) + _place(part, j, KIND, C) * 4 + u
    xs = x.to(tl.pointer_type(tl.int32))
    gain = None
    if norm is not None:
        gains = norm.to(tl.pointer_type(tl.int32))
        gain = products.load(gains, kx, 0, kx < K // 2, EVEN)
    PART: tl.constexpr = 2 if SWIGLU else 1
    tile = tl.program_id(0)
    programs = tl.num_programs(0)
    if FIRST:
        if PDL:
            tlx.gdc_wait()
    elif not ALONE:
        _meet(state, turn_of)
    last = (K - 1) // STEP * STEP
    t = products.load(xs, kx, 0, kx < K // 2, EVEN)
    squares = tl.zeros((W, 16, 16), tl.float32)
    of_row = tl.zeros((W, 1, 1), tl.float32)
    factor = tl.zeros((1, 1), tl.float32)
    if norm is not None:
        of_row = products.squares_of_row(xs, K, W * 128, DTYPE)
    if WHOLE:
        b, x_scale, squares = products.operand(squares, t, gain, KIND, GROUP, R, C, W, 1, 1, ASM, DTYPE)
    if norm is not None and ASM is not None:
        at_row = warps.place(W, 1, 1)
    for turn in tl.static_range(TURNS):
        first, stop = _rows_of(tile + turn * programs, T, N, R, PART, 0)
        n = first * 8 + tl.arange(0, R * 8)
        of_y = first // PART * 8 + tl.arange(0, R * 8 // PART)
        stored = (of_y < stop * 8 // PART)[:, None]
        at = of_y[:, None]
        if P == 4 and GROUP == 0:
            scale = tl.load(s + n, mask=n < N, other=0.0)
        if residual is not None:
            before = tl.load(residual + at, mask=stored, other=0.0)
        acc = tl.zeros((W, R * 8, 4 if IN_INT8 else 8), tl.float32)
        if not WHOLE:
            for k in range(STEP, end, STEP):
                t_next = products.load(xs, kx, k // 2, kx < (K - k) // 2, EVEN)
                if norm is not None:
                    gain_next = products.load(gains, kx, k // 2, kx < (K - k) // 2, EVEN)
                b, x_scale, squares = products.operand(squares, t, gain, KIND, GROUP, R, C, W, 1, 1, ASM, DTYPE)
                acc = products.multiply(acc, w_now, s_now, b, x_scale, KIND, GROUP, PAIRS, S, R, C, W, 1, ASM)
                w_now, s_now = _weights(w, s, first, stop, k, N, K, KIND, GROUP, PAIRS, 1, R, C, W, EVEN, True, 0)
                t = t_next
                if norm is not None:
                    gain = gain_next
            b, x_scale, squares = products.operand(squares, t, gain, KIND, GROUP, R, C, W, 1, 1, ASM, DTYPE)
        acc = products.multiply(acc, w_now, s_now, b, x_scale, KIND, GROUP, PAIRS, S, R, C, W, 1, ASM)
        if turn + 1 < TURNS:
            w_now, s_now = _first(w, s, tile + (turn + 1) * programs, T, N, K, KIND, GROUP, PAIRS, SWIGLU, R, C, W)
            if not WHOLE:
                t = products.load(xs, kx, 0, kx < K // 2, EVEN)
                if norm is not None:
                    gain = products.load(gains, kx, 0, kx < K // 2, EVEN)
        elif not LAST:
            n_now, ns_now = _first(nw, ns, tile, nT, nN, NK, KIND, GROUP, PAIRS, NSWIGLU, NR, NC, W)
        acc = tl.sum(acc, 2, keep_dims=True)
        if norm is not None and ASM is not None and turn == 0:
            warps.leave_sums(at_row, of_row)
        out = warps.total(acc, TURNS > 1, ASM, turn)
        out *= UNIT
        if norm is not None:
            if turn == 0:
                if ASM is None:
                    factor = tl.rsqrt(tl.sum(of_row, 0) / K + eps)
                else:
                    factor = tl.rsqrt(warps.take_sums(at_row, W) / K + eps)
            out *= factor
        if P == 4 and GROUP == 0:
            out *= scale.to(tl.float32)[:, None]
        if SWIGLU:
            gate, up = tl.split(out.reshape(R // 2, 2, 8, 1).permute(0, 2, 3, 1))
            out = (gate * up / (1 + tl.exp(-gate))).reshape(R * 4, 1)
        if residual is not None:
            out += before.to(tl.float32)
        tl.store(y + at, out.to(y.dtype.element_ty), mask=stored)
    if LAST:
        n_now, ns_now = w_now, s_now
    return n_now, ns_now


@triton.jit(do_not_specialize=["T1", "T2", "T3"])
def _chain_kernel(
    x, h, y, qkv, w1, s1, norm1, w2, s2, w3, s3, norm3, state, N1, N2, N3, T1, T2, T3, end1, end2, eps,
    K1: tl.constexpr, K2: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, PAIRS: tl.constexpr,
    R1: tl.constexpr, C1: tl.constexpr, U1: tl.constexpr, R2: tl.constexpr, C2: tl.constexpr, U2: tl.constexpr,
    R3: tl.constexpr, C3: tl.constexpr, U3: tl.constexpr, W: tl.constexpr, ONLY: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):
    """x -> h = swiglu(w1 n(x)) -> y = x + w2 h -> qkv = w3 n(y). ONLY one of these, 0 to 2, or all, -1."""
    tile = tl.program_id(0)
    programs = tl.num_programs(0)
    if PDL:
        tlx.gdc_launch_dependents()
    turn = tl.load(state + 1)
    if ONLY <= 0:
        w_now, s_now = _first(w1, s1, tile, T1, N1, K1, KIND, GROUP, PAIRS, True, R1, C1, W)
        w_now2, s_now2 = _phase(
            h, x, w1, s1, norm1, None, T1, N1, end1, eps, w_now, s_now, w2, s2, T2, N2, state, turn,
            K1, KIND, GROUP, PAIRS, True, R1, C1, U1, K2, False, R2, C2, ONLY == 0, True, W, ASM, PDL, ONLY >= 0, 0,
        )
        if ONLY < 0:
            turn = _arrive(state, programs)
    if ONLY == 1:
        w_now2, s_now2 = _first(w2, s2, tile, T2, N2, K2, KIND, GROUP, PAIRS, False, R2, C2, W)
    if ONLY < 0 or ONLY == 1:
        w_now3, s_now3 = _phase(
            y, h, w2, s2, None, x, T2, N2, end2, eps, w_now2, s_now2, w3, s3, T3, N3, state, turn,
            K2, KIND, GROUP, PAIRS, False, R2, C2, U2, K1, False, R3, C3, ONLY == 1, False, W, ASM, PDL, ONLY >= 0, 1,
        )
        if ONLY < 0:
            turn = _arrive(state, programs)
    if ONLY == 2:
        w_now3, s_now3 = _first(w3, s3, tile, T3, N3, K1, KIND, GROUP, PAIRS, False, R3, C3, W)
    if ONLY < 0 or ONLY == 2:
        _phase(
            qkv, y, w3, s3, norm3, None, T3, N3, end1, eps, w_now3, s_now3, w3, s3, T3, N3, state, turn,
            K1, KIND, GROUP, PAIRS, False, R3, C3, U3, K1, False, R3, C3, True, False, W, ASM, PDL, ONLY >= 0, 2,
        )


def chain(x, of1, norm1, of2, of3, norm3, eps, how, state=None, only=(-1,), buffers=None):
    """x (1, K): -> y, qkv. ofN: (weight, scales). how: (W, maxnreg, ctas, (R, C, U) three times)."""
    (w1, s1), (w2, s2), (w3, s3) = of1, of2, of3
    kind = L.kind_of(w1); K1, N1 = x.shape[-1], L.out_features(w1); K2, N2, N3 = N1 // 2, L.out_features(w2), L.out_features(w3)
    group, pairs = L.group_of(K1, kind, s1)
    W, maxnreg, ctas, *cfg = how
    launch = pdl(x.device)
    programs = ctas * tuning.processors(x.device)
    if buffers is None:
        buffers = [torch.empty(1, n, dtype=x.dtype, device=x.device) for n in (K2, N2, N3)]
    h, y, qkv = buffers
    T = [programs * c[2] for c in cfg]
    for n, c, t in zip((N1 // 2, N2, N3), cfg, T):  # rows a tile has at most
        part = 2 if n == N1 // 2 and c is cfg[0] else 1
        assert -(-(n // 8) // t) * part <= c[0], (n, c, t, -(-(n // 8) // t) * part)
    for o in only:
        _chain_kernel[(programs,)](
            x, h, y, qkv, w1.view(torch.int32), s1, norm1, w2.view(torch.int32), s2, w3.view(torch.int32), s3, norm3, state,
            N1, N2, N3, *T, K1, K2, eps, K1, K2, kind, group, pairs, *cfg[0], *cfg[1], *cfg[2], W, o,
            products.assembly(kind, group == 0) if launch["PDL"] else None, num_warps=W, num_stages=1, **launch, **({"maxnreg": maxnreg} if launch["PDL"] else {}),
        )
    return y, qkv


def reference(x, of1, norm1, of2, of3, norm3, eps):
    h = L.linear(x, *of1, None, norm1, eps, None, swiglu=True)
    y = L.linear(x=h, weight=of2[0], scales=of2[1], residual=x)
    return y, L.linear(y, *of3, None, norm3, eps)


if what == "test":
    from test_kernels import make_weight, on_device
    for kind in ("int4:32", "int8", "16-bit"):
        g = torch.Generator().manual_seed(1); K, I, Q = 256, 320, 96
        of = [make_weight(kind, n, k, torch.float16, g)[:2] for n, k in ((2 * I, K), (K, I), (Q, K))]
        x = torch.randn(1, K, generator=g).half(); n1, n3 = (torch.rand(K, generator=g) + .5).half(), (torch.rand(K, generator=g) + .5).half()
        a = reference(x, of[0], n1, of[1], of[2], n3, 1e-5)
        tuning.processors = lambda d: 3
        state = torch.zeros(4, dtype=torch.int32)
        b = chain(x, of[0], n1, of[1], of[2], n3, 1e-5, (2, 168, 2, (8, 1, 2), (4, 1, 2), (2, 2, 1)), state, (0, 1, 2))
        print(kind, [(p - q).abs().max().item() for p, q in zip(a, b)], [p.abs().max().item() for p in a])

CONFIGS = {  # (W, maxnreg, programs a multiprocessor, (R, C, turns) of w13, w2, wqkv)
    "7B:int4": [(16, 128, 1, (8, 1, 3), (4, 1, 1), (4, 2, 3)), (8, 128, 2, (8, 1, 2), (2, 2, 1), (4, 1, 2)), (8, 128, 2, (8, 1, 2), (2, 1, 1), (2, 1, 3)), (16, 128, 1, (8, 1, 3), (4, 1, 1), (4, 1, 3)), (4, 168, 3, (8, 1, 1), (2, 2, 1), (4, 1, 1)), (8, 120, 2, (4, 1, 3), (2, 2, 1), (4, 1, 2))],
    "Llama-3.2-1B:int4": [(16, 128, 1, (4, 1, 4), (2, 2, 1), (4, 1, 1)), (8, 128, 2, (4, 1, 2), (2, 2, 1), (2, 2, 1)), (8, 80, 2, (4, 1, 2), (2, 1, 1), (2, 1, 1)), (16, 128, 1, (8, 1, 2), (2, 2, 1), (4, 1, 1)), (4, 168, 3, (4, 1, 2), (2, 2, 1), (2, 2, 1))],
    "7B:int8": [(8, 128, 2, (4, 2, 3), (2, 4, 1), (4, 2, 2)), (16, 120, 1, (4, 2, 6), (4, 2, 1), (4, 2, 3)), (8, 128, 2, (2, 4, 6), (2, 4, 1), (2, 4, 3)), (4, 128, 4, (4, 2, 2), (2, 4, 1), (4, 2, 1))],
    "7B:bf16": [(16, 120, 1, (2, 8, 11), (4, 4, 1), (2, 8, 6)), (8, 128, 2, (2, 8, 6), (2, 8, 1), (2, 8, 3))],
}
if what == "compile":
    from test_compile import empty_weight
    tuning.processors = lambda d: 132
    for job, list_ in CONFIGS.items():
        K, I, Q = (2048, 8192, 3072) if "1B" in job else (4096, 11008, 12288)
        kind = {"int4": "int4:32", "int8": "int8", "bf16": "16-bit"}[job.split(":")[1]]
        of = [empty_weight(kind, n, k) for n, k in ((2 * I, K), (K, I), (Q, K))]
        for how in list_:
            print(job, how, end=" ")
            try: chain(torch.empty(1, K, dtype=torch.bfloat16), of[0], torch.empty(K, dtype=torch.bfloat16), of[1], of[2], torch.empty(K, dtype=torch.bfloat16), 1e-5, how, torch.empty(4, dtype=torch.int32))
            except AssertionError as e: print("too few rows a tile", e)
            except Exception as e: print(type(e).__name__, str(e)[-300:])

if what in ("run", "warm"):
    import bench, ops
    from dataclasses import replace
    from model import ModelConfig
    device = torch.device("cuda")
    with torch.inference_mode():
        for job in sys.argv[2:]:
            name, kind = job.split(":", 1); config = ModelConfig.from_name(name)
            torch.manual_seed(0)
            model = bench.random_model(replace(config, n_layer=2 if what == "warm" else config.n_layer), kind, device, torch.bfloat16)
            cache = model.cache(1, 205, None); tokens = torch.ones(1, 1, dtype=torch.int64, device=device); pos = torch.full((1,), 102, device=device)
            state = torch.zeros(4, dtype=torch.int32, device=device)
            of = lambda m: (m.weight, m.scales)
            def step(how):
                x = model.tok_embeddings(tokens)
                layers = list(model.layers); qkv = layers[0].attention.project_in(x, layers[0].attention_norm)
                for i, (layer, kv, rope) in enumerate(zip(layers, cache.layers, cache.rope)):
                    x = layer.attention.project_out(ops.attention(layer.attention, qkv, kv, pos, rope), x, None)
                    ff = layer.feed_forward
                    if i + 1 < len(layers):
                        nx = layers[i + 1]
                        x, qkv = chain(x[0], of(ff.w13), layer.ffn_norm.weight, of(ff.w2), of(nx.attention.wqkv), nx.attention_norm.weight, config.norm_eps, how, state)
                        x, qkv = x[None], qkv[None]
                    else:
                        x = ff(x, layer.ffn_norm)
                return model.logits(x)
            def timed(f):
                f(); torch.cuda.synchronize(); g = torch.cuda.CUDAGraph()
                with torch.cuda.graph(g): out = f()
                for _ in range(3): g.replay()
                ts = []
                for _ in range(4):
                    a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True); a.record()
                    for _ in range(10): g.replay()
                    b.record(); torch.cuda.synchronize(); ts.append(a.elapsed_time(b) * 100)
                return sorted(ts), out.float().clone()
            base, want = timed(lambda: model(tokens, pos, cache, all_logits=True))
            print("CHAIN", job, "now", round(base[0], 1), flush=True)
            for how in CONFIGS[job]:
                try:
                    ts, out = timed(lambda: step(how))
                    print("  ", how, round(ts[0], 1), round(ts[-1], 1), f"{(ts[0] / base[0] - 1) * 100:+.1f}%", "error", f"{((out - want).norm() / want.norm()).item():.1e}", flush=True)
                except Exception as e: print("  ", how, repr(e)[:200], flush=True)
            del model, cache; bench.release(device)
