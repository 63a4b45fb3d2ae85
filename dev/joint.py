# ruff: noqa
"""joint.py compile FIRST COUNT JOB... | run SECONDS JOB... : configurations of a layer's four kernels together, from several
starts: the ones shipped, and light ones, beside which the next kernel's programs find registers before these end.
(One kernel at a time from those shipped finds nothing any more.) JOB: MODEL:KIND. Steps of 8 layers, one row."""
import os, sys, time
tree = os.environ.get("TREE", os.getcwd()); sys.path[:0] = [tree, tree + "/scripts"]
from dataclasses import replace
from unittest.mock import patch
import bench, torch
from model import ModelConfig
from ops import linear_triton, tuning
from ops.tuning import Configuration
L8, L1 = "Llama-3.1-8B", "Llama-3.2-1B"
I4 = dict(
 w13=[(64,1,4,168,2,1),(32,1,8,80,2,1),(32,1,8,96,2,1),(32,1,4,96,4,1),(32,1,4,80,6,1),(32,1,8,80,3,1),(64,1,4,128,2,1),(64,1,4,128,3,1),(32,2,4,128,3,1),(32,1,8,64,4,1)],
 wqkv=[(32,1,4,96,3,1),(32,1,8,80,2,1),(32,1,8,96,2,1),(16,1,8,64,3,1),(32,1,4,80,4,1),(64,1,4,168,2,1),(16,2,4,80,6,1),(16,1,8,64,4,1)],
 w2=[(16,1,8,64,2,1),(16,2,8,96,2,1),(16,1,16,64,1,0),(16,1,16,64,2,1),(32,1,8,96,1,0),(16,2,8,128,2,1),(16,2,16,80,1,0),(16,2,8,96,1,0)],
 wo=[(16,2,8,96,2,1),(16,2,8,96,2,0),(16,4,8,128,2,0),(32,2,8,128,1,0),(16,2,16,80,1,0),(16,4,8,128,1,0)])
I8 = dict(
 w13=[(16,2,8,64,2,1),(16,2,8,64,3,1),(16,2,4,64,6,1),(16,2,4,80,4,1),(32,2,4,128,3,1),(32,2,4,96,4,1),(16,4,4,96,3,1),(32,2,8,96,2,1),(16,2,4,96,3,1)],
 wqkv=[(16,2,8,64,2,1),(16,2,8,64,3,1),(16,2,4,80,4,1),(32,2,4,128,2,1),(32,2,4,128,3,1),(16,4,4,96,3,1)],
 w2=[(16,2,8,64,2,1),(16,4,8,96,2,1),(16,2,16,64,1,0),(16,4,8,96,1,0),(16,2,16,64,2,1),(16,4,16,96,1,0)],
 wo=[(16,2,8,64,2,1),(16,2,8,64,2,0),(16,4,8,96,2,0),(16,4,8,96,2,1),(16,2,16,64,1,0)])
C = {"7B:int4": I4, L8 + ":int4": I4, L1 + ":int4": I4, "7B:int8": I8, L1 + ":int8": I8}
what, *rest = sys.argv[1:]
first, count = (int(rest.pop(0)), int(rest.pop(0))) if what == "compile" else (0, 1)
limit = float(rest.pop(0)) if what == "run" else 0
device = torch.device("cuda")
with torch.inference_mode():
    for job in rest:
        name, kind = job.split(":", 1)
        config = replace(ModelConfig.from_name(name), n_layer=1 if what == "compile" else 8, vocab_size=32000)
        torch.manual_seed(0)
        model = bench.random_model(config, kind, device, torch.bfloat16)
        layer = model.layers[0]; at, ff = layer.attention, layer.feed_forward
        parts = {"w13": ff.w13, "wqkv": at.wqkv, "w2": ff.w2, "wo": at.wo}
        of = linear_triton.kind_of(at.wqkv.weight)
        table = tuning.tables(device)[0].setdefault(tuning.key(of, 1), {})
        shape = {k: (m.out_features, m.in_features) for k, m in parts.items()}
        own = {k: tuning.configuration(of, *shape[k], 1, device) for k in parts}
        cases = {k: list(dict.fromkeys([own[k], *(Configuration(*c[:5], bool(c[5])) for c in C[job][k])])) for k in parts}
        bad, seen = set(), {}
        def step(chosen):
            key = tuple(chosen[k] for k in parts)
            if any((k, chosen[k]) in bad for k in parts): return 9e9
            if key not in seen:
                torch.cuda.synchronize()
                with patch.dict(table, {shape[k]: c for k, c in chosen.items()}):
                    seen[key] = bench.step_time(model, 1, 205) * 1e6
            return seen[key]
        if what == "compile":
            for k, c in [(k, c) for k in parts for c in cases[k]][first::count]:
                try: step(own | {k: c})
                except Exception as e: print("failed", job, k, c, repr(e)[:120], flush=True)
            continue
        begin, best = time.perf_counter(), (9e9, None)
        start = min(step(own), step(own))
        for k in parts:
            for c in cases[k]:
                try: step(own | {k: c})
                except Exception as e: bad.add((k, c))
        alone = {k: sorted((seen[tuple((own | {k: c})[p] for p in parts)], i) for i, c in enumerate(cases[k]) if (k, c) not in bad) for k in parts}
        print(job, f"start {start:.1f}", {k: [(tuple(vars(cases[k][i]).values()), round(t, 1)) for t, i in v[:3]] for k, v in alone.items()}, flush=True)
        light = {k: [c for c in cases[k][1:] if (k, c) not in bad and c.maxnreg * 32 * c.num_warps * max(1, c.ctas_per_sm) <= 43008] for k in parts}
        starts = [own] + [{k: (light[k] or cases[k])[n % len(light[k] or cases[k])] for k in parts} for n in range(12)]
        for s in starts:
            now, us = dict(s), step(s)
            for turn in range(3):
                before = us
                for k in parts:
                    for c in cases[k]:
                        if time.perf_counter() - begin > limit: break
                        if (t := step(now | {k: c})) < us: us, now = t, now | {k: c}
                if us >= before * .999: break
            if us < best[0]: best = us, now; print("  ", f"{us:.1f}", {k: tuple(vars(c).values()) for k, c in now.items()}, "from", f"{step(s):.1f}", flush=True)
            if time.perf_counter() - begin > limit: break
        again = [min(step.__wrapped__(own) if hasattr(step, "__wrapped__") else bench.step_time(model, 1, 205) * 1e6 for _ in range(2))]
        with patch.dict(table, {shape[k]: c for k, c in best[1].items()}): again.append(min(bench.step_time(model, 1, 205) * 1e6 for _ in range(2)))
        print("JOINT", job, [round(a, 1) for a in again], {k: (shape[k], tuple(vars(c).values())) for k, c in best[1].items() if c != own[k]}, len(seen), "steps", f"{time.perf_counter() - begin:.0f} s", flush=True)
        del model; bench.release(device)
