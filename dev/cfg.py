# ruff: noqa
"""Configurations of one row in steps: cfg.py compile FIRST COUNT | run [apply], JOB."""
import json, os, sys
tree = os.environ.get("TREE", os.getcwd()); sys.path[:0] = [tree, tree + "/scripts"]
from dataclasses import replace
from unittest.mock import patch
import bench, ops, torch
from measure import weight_bytes
from model import ModelConfig
from ops import linear_triton, tuning
from ops.tuning import Configuration
L8, L1 = "Llama-3.1-8B", "Llama-3.2-1B"
C1 = {
 "7B:fp8": dict(w13=[(32,2,8,128,2,1),(32,1,8,96,2,1),(16,2,8,96,2,1),(32,2,16,64,1,1),(64,2,4,240,2,1)], wqkv=[(32,2,8,128,2,1),(32,4,4,168,3,1),(16,4,8,128,2,1)], w2=[(16,4,16,120,1,0),(16,2,16,64,2,1),(32,2,8,128,2,1)], wo=[(32,2,8,128,2,1),(32,4,8,240,1,0),(16,4,8,128,2,0)], out=[(32,2,8,128,2,1),(32,2,4,128,4,1)]),
}
C8 = {
 "7B:int8": dict(w13=[(32,2,4,168,3,1)], w2=[(16,4,8,128,2,0),(32,4,8,240,1,0)], wqkv=[(32,2,4,168,3,1),(32,2,4,128,4,1)], out=[(32,2,4,128,4,0)]),
 L8+":int8": dict(w13=[(32,2,4,168,3,1)], w2=[(16,4,8,128,2,1),(16,4,8,128,2,0)], wqkv=[(16,4,2,240,3,0)]),
 L1+":int8": dict(w13=[(32,2,2,240,0,0),(64,2,4,240,2,1)], wo=[(16,4,4,240,1,0),(16,4,8,240,1,0)], w2=[(16,4,8,240,1,0)], out=[(32,2,4,128,4,0)]),
 "7B:bf16": dict(w13=[(32,4,4,240,2,1)], wo=[(16,8,4,240,2,0)]),
 L8+":bf16": dict(w13=[(16,4,4,168,0,0)], wqkv=[(16,4,4,168,3,0),(16,4,2,168,0,0),(32,4,4,240,2,1)]),
 "7B:int4": dict(w13=[(32,1,4,168,3,1),(32,1,2,152,6,0)], wo=[(16,1,8,120,2,0),(16,2,4,240,2,0)]),
 L8+":int4": dict(wqkv=[(32,1,4,168,2,1),(16,1,4,168,3,0)], w2=[(32,1,8,240,1,0)]),
 L1+":int4": dict(w13=[(64,1,4,240,2,0)], wo=[(16,4,4,240,2,0)]),
}
I4 = [(32,1,2,240,4,0),(32,1,2,240,4,1),(32,1,4,240,2,1),(16,1,4,168,3,0),(16,1,2,168,6,0)]
I8 = [(32,2,2,240,4,1),(32,2,4,240,2,1),(16,2,4,168,3,0),(16,2,2,168,6,0),(32,2,2,168,6,1)]
D4 = [(16,1,8,240,1,0),(16,1,8,128,2,0),(16,1,4,168,3,0),(32,1,8,240,1,0),(16,2,4,240,2,0)]
D8 = [(16,2,8,128,2,0),(16,4,4,240,2,0),(16,2,4,168,3,0),(32,2,8,240,1,0)]
C16 = {
 "7B:int4": dict(w13=I4, wqkv=I4, w2=D4, wo=D4), L8+":int4": dict(w13=I4, wqkv=I4, w2=D4), L1+":int4": dict(w13=I4, wqkv=D4, w2=D4, wo=D4),
 "7B:int8": dict(w13=I8, wqkv=I8, w2=D8, wo=D8), L8+":int8": dict(w13=I8, wqkv=I8, w2=D8), L1+":int8": dict(w13=I8, wqkv=D8, w2=D8, wo=D8),
 "7B:bf16": dict(w13=[(16,4,4,240,2,0),(32,4,4,240,2,1),(16,4,2,240,4,0)], wqkv=[(16,4,4,240,2,0),(16,4,2,240,4,0)], w2=[(16,4,4,240,2,0),(16,4,8,240,1,0)]),
}
ROWS = int(os.environ.get("ROWS", 1))
C = {1: C1, 8: C8, 16: C16}[ROWS]
picked = {}
what, *rest = sys.argv[1:]
device = torch.device("cuda")
def main(job):
    name, mode = job.split(":", 1)
    config = ModelConfig.from_name(name)
    if what == "compile":
        config = replace(config, n_layer=1)
    torch.manual_seed(0)
    model = bench.random_model(config, mode, device, torch.bfloat16)
    layer = model.layers[0]; at = layer.attention
    kind = linear_triton.kind_of(at.wqkv.weight)
    dense = tuning.tables(device)[0].setdefault(tuning.key(kind, ROWS), {})
    moe = tuning.tables(device, "experts")[0].setdefault(tuning.key(kind, ROWS), {})
    parts = {"wo": at.wo, "wqkv": at.wqkv, "out": model.output}
    if layer.block_sparse_moe: parts |= {"up": layer.block_sparse_moe.cond_ffn.w13, "down": layer.block_sparse_moe.cond_ffn.w2}
    else: parts |= {"w13": layer.feed_forward.w13, "w2": layer.feed_forward.w2}
    cases = {}
    for of, found in C[job].items():
        shape = parts[of].out_features, parts[of].in_features
        own = tuning.experts(kind, *shape, ROWS, 8, of == "down", device) if of in ("up", "down") else tuning.configuration(kind, *shape, ROWS, device)
        cases[of] = shape, list(dict.fromkeys([own, *(Configuration(*c[:5], bool(c[5])) for c in found)]))
    def step(chosen):
        torch.cuda.synchronize()
        a = {cases[of][0]: how for of, how in chosen.items() if of not in ("up", "down")}
        b = {cases[of][0]: how for of, how in chosen.items() if of in ("up", "down")}
        with patch.dict(dense, a), patch.dict(moe, b):
            return bench.step_time(model, ROWS, 205) * 1e6
    if what == "compile":
        for of, how in [(of, how) for of, (_, found) in cases.items() for how in found][(first + Q.index(job)) % count::count]:
            try: step({of: how})
            except Exception as e: print("failed", job, of, how, repr(e)[:150], flush=True)
        return
    best = start = min(step({}), step({}))
    chosen = {}
    for of, (_, found) in cases.items():
        times = {}
        for how in found:
            try: times[how] = step(chosen | {of: how})
            except Exception as e: print("failed", of, how, repr(e)[:150])
        order = sorted(times, key=times.get)
        print(job, of, [(*vars(how).values(), round(times[how], 1)) for how in order[:4]], "own", tuple(vars(found[0]).values()), round(times[found[0]], 1), flush=True)
        if times[order[0]] < best * 0.9985 and (us := step(chosen | {of: order[0]})) < best * 0.9985:
            best, chosen = us, chosen | {of: order[0]}
    print(job, f"BEST {start:.1f} -> {best:.1f} us", {of: (cases[of][0], tuple(vars(how).values())) for of, how in chosen.items()}, flush=True)
    for of, how in chosen.items(): picked.setdefault((*tuning.key(kind, ROWS), *cases[of][0]), how)
with torch.inference_mode():
    if what == "compile": first, count = int(rest.pop(0)), int(rest.pop(0))
    Q = rest or list(C)
    for job in Q:
        main(job); bench.release(device)

if what == "apply":
    path = tree + "/ops/tuned/h200.json"; raw = json.load(open(path)); rows = raw["linear"]
    for (kind, m, N, K), how in picked.items():
        t = {"kind": kind, "max_rows": m, "N": N, "K": K, **{k: v for k, v in vars(how).items() if v is not False}}
        at = [i for i, r in enumerate(rows) if (r["kind"], r["max_rows"], r["N"], r["K"]) == (kind, m, N, K)]
        if at: rows[at[0]] = t
        else: rows.insert(max([i for i, r in enumerate(rows) if (r["kind"], r["max_rows"]) == (kind, m)], default=len(rows) - 1) + 1, t)
    text = lambda v: "[\n" + ",\n".join("  " + json.dumps(r) for r in v) + "\n ]" if isinstance(v, list) and v and isinstance(v[0], dict) else json.dumps(v)
    for to in (path, os.environ["OUT"] + "/tuned.json"): open(to, "w").write("{\n" + ",\n".join(f" {json.dumps(k)}: {text(v)}" for k, v in raw.items()) + "\n}\n")
