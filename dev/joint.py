# ruff: noqa
"""joint.py compile WORKERS JOB... | run SECONDS JOB... : a layer's four configurations together, from a wide set around those
shipped, light ones with them, and attention's prefetch on or off. JOB: MODEL:KIND:ROWS. Steps of 8 layers."""
import os, sys, time, random, itertools, math
tree = os.environ.get("TREE", os.getcwd()); sys.path[:0] = [tree, tree + "/scripts"]
from dataclasses import replace
from functools import partial
from unittest.mock import patch
import torch
if os.environ.get('KEY'):  # kernels compiled on another machine, whose Python and so Triton's key are others
    import triton.runtime.cache as _c; _c.triton_key = lambda: 'k'
N_CAND = int(os.environ.get("CAND", 28))
def dims(config):
    qkv = (config.n_head + 2 * config.n_local_heads) * config.head_dim
    return {"wqkv": (qkv, config.dim), "wo": (config.dim, config.n_head * config.head_dim), "w13": (2 * config.intermediate_size, config.dim), "w2": (config.dim, config.intermediate_size)}
def cases(own, kind, N, K, M, seed):
    from ops import tuning
    from ops.tuning import Configuration
    R0, C0, W0 = own.tile_rows // 8, own.k_repeat, own.num_warps
    out = {}
    for R, C, W in itertools.product((2, 4, 8), (1, 2, 4, 8), (2, 4, 8, 16)):
        d = abs(math.log2(R / R0)) + abs(math.log2(C * W / C0 / W0)) + .4 * abs(math.log2(W / W0))
        if tuning.CHUNK[kind] * W * C >= 2 * K or d > 2.1: continue
        if kind == 'fp8' and C > 4: continue
        words = 4 * R * C
        x = C * tuning.CHUNK[kind] // 32 * 4 if M > 1 else 4
        for P in (1, 2, 3, 4, 5, 6) if M == 1 else (1, 2, 3, 4, 5, 6, 8):
            full = min(240, 65536 // (32 * W * P) // 8 * 8)
            tiles = N // 8 // R
            inflight = min(P, -(-tiles // 132)) * 32 * W * words * 4
            if inflight < 12 * 1024: continue
            for regs in sorted({full, max(64, int(full * .75) // 8 * 8), max(64, int(full * .625) // 8 * 8)}):
                if words + x + 32 > regs or regs > full: continue
                for share in (False, True):
                    if share and (N % 16 or R == 2 and M == 1 and tiles < 132): continue
                    for ctas in ((P, 0) if not share and tiles > P * 132 and regs == full else (P,)):
                        c = Configuration(8 * R, C, W, regs, ctas, share)
                        near = d + (0 if P == own.ctas_per_sm else .7) + (0 if share == own.share else .4) + (0 if regs == full else .3)
                        out[c] = near
    rng = random.Random(seed)
    if M > 1:
        C1 = {"fp": 4, "int8": 2, "fp8": 2, "int4": 1}[kind]
        for R, c, W, regs, P in ((32, 1, 16, 128, 1), (32, 1, 16, 120, 1), (32, 1, 8, 128, 2), (32, 1, 8, 240, 1), (64, 1, 8, 240, 1), (64, 1, 4, 240, 2), (64, 1, 4, 168, 3), (32, 1, 4, 128, 4), (32, 1, 4, 168, 3), (16, 1, 16, 128, 1), (16, 2, 16, 128, 1), (16, 2, 8, 128, 2), (32, 2, 8, 240, 1), (32, 2, 4, 240, 2)):
            for sh in (False, True):
                if tuning.CHUNK[kind] * W * c * C1 < 2 * K and 4 * R // 8 * c * C1 * 1 + C1 * c * tuning.CHUNK[kind] // 8 + 32 <= regs and not (sh and N % 16) and (kind != "fp8" or c * C1 <= 4): out[Configuration(R, c * C1, W, regs, P, sh)] = -1
    if M == 1 and kind == "fp":
        for c in ((16, 4, 16, 120, 1, False), (16, 4, 16, 80, 1, False), (16, 8, 16, 120, 1, False), (32, 4, 8, 128, 2, True), (32, 4, 4, 128, 4, True), (16, 8, 8, 168, 1, False), (16, 4, 8, 80, 2, True), (16, 4, 8, 96, 2, False), (32, 8, 8, 240, 1, True)): out[Configuration(*c)] = -1
    if M == 1 and kind == "int8":
        for c in ((32, 2, 4, 96, 4, True), (16, 4, 8, 96, 2, True), (16, 4, 8, 96, 2, False), (16, 4, 16, 96, 1, False), (32, 2, 8, 96, 2, True), (16, 2, 8, 64, 3, True)): out[Configuration(*c)] = -1
    ranked = sorted(out, key=lambda c: out[c] + rng.random() * 1.6)
    return [own] + [c for c in ranked if c != own][:N_CAND - 1]
def of_job(job):
    from model import ModelConfig
    name, rest = job.split(":", 1); kind, M = rest.rsplit(":", 1)
    return ModelConfig.from_name(name), kind, int(M)
TK = {"bf16": "fp", "int4": "int4", "int4:128": "int4"}
BEST = {}
def choices(job, device):
    from ops import tuning
    config, kind, M = of_job(job)
    k = TK.get(kind, kind)
    best = BEST.get(job, {})
    start = lambda n, s: tuning.Configuration(*best[n]) if n in best else tuning.configuration(k, *s, M, device)
    return {n: cases(start(n, s), k, *s, M, __import__("zlib").crc32(repr((n, s)).encode())) for n, s in dims(config).items()}
class NoTP: rank, world = 0, 1
def compile_job(job, name, K, choice):
    import bench, tune
    config, kind, M = of_job(job)
    N = dims(config)[name][0]
    layer = LAYER.get((kind, N, K))
    if layer is None:
        from ops import packing
        sys.path.insert(0, tree + "/tests")
        from test_compile import empty_weight
        layer = LAYER[kind, N, K] = empty_weight({"bf16": "16-bit", "int4": "int4:32"}.get(kind, kind), N, K)
    w, s = layer[:2]
    try: tune.compile_layer(name, tune._like(w), tune._like(s), K, M, NoTP, choice)
    except Exception as e: print("failed", job, name, choice, repr(e)[-150:], flush=True)
LAYER = {}
def start():
    from compile_only import compile_only
    compile_only()
    from ops import symmetric
    torch.set_num_threads(1)
def call(j): compile_job(*j)
def main():
    what, n, *jobs = sys.argv[1:]
    device = torch.device("cuda")
    if what == "compile":
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing import get_context
        if os.environ.get("FAKE"):
            from ops import common, tuning
            class G: name = "NVIDIA H200"; processors = 132; capability = (9, 0)
            common.gpu = lambda d: G
        work = []
        for job in jobs:
            for name, cs in choices(job, device).items():
                K = dims(of_job(job)[0])[name][1]
                work += [(job, name, K, c) for c in cs]
        work = list(dict.fromkeys(work))
        if os.environ.get("FAKE"): print({j: {k: len(v) for k, v in choices(j, device).items()} for j in jobs}); work = work[:: max(1, len(work) // int(os.environ['FAKE']))]
        print(len(work), "to compile", flush=True)
        with ProcessPoolExecutor(int(n), mp_context=get_context("spawn"), initializer=start) as pool: list(pool.map(call, work, chunksize=2))
        return
    import bench
    from ops import linear_triton, tuning
    limit = float(n)
    with torch.inference_mode():
        for job in jobs:
            begin = time.perf_counter()
            config, kind, M = of_job(job)
            config = replace(config, n_layer=8, vocab_size=16000)
            torch.manual_seed(0)
            model = bench.random_model(config, kind, device, torch.bfloat16)
            if os.environ.get("SLOW"):  # as a decode has it: an engine, and a kernel launched by itself between two graphs
                from engine import Engine
                from sampling import Sampler
                llm = Engine(model, batch_size=1, max_seq_length=205, sampler=Sampler(), compile=True)
                other = torch.zeros(1, dtype=torch.int64, device=device); replay = torch.cuda.CUDAGraph.replay
                torch.cuda.CUDAGraph.replay = lambda graph: (other.fill_(3), replay(graph))[1]
            shape = dims(config); parts = list(shape)
            of = TK.get(kind, kind)
            table = tuning.tables(device)[0].setdefault(tuning.key(of, M), {})
            lists = choices(job, device)
            own = {k: lists[k][0] for k in parts}
            lines = [l.attention.prefetch_lines for l in model.layers]
            own["at"] = BEST.get(job, {}).get("at", 1.0); lists["at"] = [own["at"]] + ([a for a in (0.0, .25, .5, 1.0, 2.0) if a != own["at"]] if lines[0][1] else [])
            allp = parts + ["at"]
            bad, seen = set(), {}
            def raw(ch):
                for l, a in zip(model.layers, lines): l.attention.prefetch_lines = tuple(int(b * ch["at"]) for b in a)
                with patch.dict(table, {shape[k]: ch[k] for k in parts}): return bench.step_time(model, M, 205) * 1e6
            def step(ch):
                if any((k, ch[k]) in bad for k in allp): return 9e9
                key = tuple(ch[k] for k in allp)
                if key not in seen: seen[key] = raw(ch)
                return seen[key]
            torch.cuda.synchronize(); first = min(raw(own), raw(own)); begin = time.perf_counter()
            singles = {}
            for k in allp:
                r = []
                for c in lists[k]:
                    try: r.append((step(own | {k: c}), c))
                    except Exception as e: bad.add((k, c))
                singles[k] = sorted(r, key=lambda p: p[0])
            tup = lambda c: tuple(vars(c).values()) if hasattr(c, "tile_rows") else c
            shipped = {k: tuning.configuration(of, *shape[k], M, device) for k in parts} | {"at": 1.0}
            print(job, f"shipped {raw(shipped):.1f} start {first:.1f}", {k: [(tup(c), round(t / first * 100 - 100, 1)) for t, c in v[:3]] for k, v in singles.items()}, len(bad), f"{time.perf_counter() - begin:.0f} s", flush=True)
            top = {k: [c for t, c in v[:12]] for k, v in singles.items()}
            rng = random.Random(0); best = (9e9, None)
            def descend(now):
                us = step(now)
                while True:
                    before = us
                    for k in rng.sample(allp, len(allp)):
                        for c in top[k]:
                            if time.perf_counter() - begin > limit: return us, now
                            if (t := step(now | {k: c})) < us * .9995: us, now = t, now | {k: c}
                    if us >= before * .9995: return us, now
            starts = [own, {k: v[0] for k, v in top.items()}]
            n = 0
            while time.perf_counter() - begin < limit:
                s = starts.pop(0) if starts else {k: rng.choice(v[:8]) for k, v in top.items()}
                us, now = descend(dict(s)); n += 1
                if us < best[0]: best = us, now
            torch.cuda.synchronize()
            a, b = [], []
            for _ in range(4): a.append(raw(own)); b.append(raw(best[1]))
            print("JOINT", job, f"{min(a):.1f} -> {min(b):.1f} ({(min(b) / min(a) - 1) * 100:+.1f}%)", [round(x, 1) for x in sorted(a)[:2] + sorted(b)[:2]], {k: (shape.get(k), tup(c)) for k, c in best[1].items() if c != own[k]}, len(seen), n, flush=True)
            if os.environ.get("WRITE") and min(b) < min(a) * .995 and best[1]["at"] == 1.0:
                for k in parts: table[shape[k]] = best[1][k]
                print("wrote", tuning.write(device), flush=True)
            # what each change alone is worth, from the best
            print("   without", {k: round((raw(best[1] | {k: own[k]}) / min(b) - 1) * 100, 1) for k in allp if best[1][k] != own[k]}, flush=True)
            if os.environ.get("SLOW"): torch.cuda.CUDAGraph.replay = replay; del llm
            del model; bench.release(device)
if __name__ == "__main__": main()
