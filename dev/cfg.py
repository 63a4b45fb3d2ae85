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
C = {
 "Qwen3-30B-A3B:int4": dict(
  up=[(32,2,4,144,0),(32,4,4,168,0),(32,1,4,128,0),(64,2,4,168,0),(16,4,4,128,0),(32,2,2,168,0),(64,1,4,168,0),(32,4,4,240,0)],
  down=[(16,2,16,128,1),(16,2,8,128,0),(32,2,16,128,1),(16,1,8,128,2),(16,4,8,168,0)],
  wo=[(16,4,8,128,1),(16,4,8,168,0),(16,2,8,128,0),(16,1,16,128,1),(32,2,16,128,1)],
  wqkv=[(32,2,8,128,2),(16,2,8,128,0),(64,1,16,128,1),(32,1,16,128,1),(16,2,8,96,0),(32,2,4,168,0),(16,4,4,128,0),(16,1,8,80,0),(16,1,16,64,2)]),
 "Llama-3.2-1B:int4": dict(
  wqkv=[(32,2,8,128,2),(32,2,8,240,1),(16,2,8,128,0),(16,1,16,64,2),(32,1,16,128,1),(16,4,4,128,0)],
  wo=[(16,1,16,64,0),(16,2,8,128,0),(16,1,16,128,1),(32,1,16,128,1),(16,4,4,168,0)],
  w13=[(32,2,4,168,0),(64,1,4,168,3),(32,2,4,128,0),(64,2,4,240,0),(32,1,8,128,2)],
  w2=[(16,2,16,128,1),(16,2,8,128,0),(32,2,16,128,1),(16,4,8,168,0),(16,4,16,128,1)],
  out=[(32,2,8,128,0),(32,2,4,168,0),(32,4,4,240,0)]),
 "7B:int4": dict(
  wqkv=[(32,2,4,168,0),(32,1,4,128,0),(16,2,8,128,0),(32,2,8,128,0),(64,1,4,168,3)],
  w13=[(64,2,4,240,0),(32,2,4,168,0),(32,1,4,168,0),(32,2,8,128,0),(64,1,8,128,2)],
  w2=[(32,2,16,128,1),(32,2,8,240,1),(32,4,8,240,1),(16,2,8,128,2),(16,2,16,64,2)],
  wo=[(32,2,16,128,1),(16,4,8,128,2)]),
 "7B:int8": dict(
  wqkv=[(32,4,4,168,0),(32,2,4,168,0),(16,4,4,128,0),(16,4,8,96,0),(32,2,8,128,2)],
  w13=[(16,4,4,128,0),(32,2,4,128,0),(32,4,4,168,0)],
  w2=[(32,4,8,240,1),(32,4,16,120,1),(16,4,8,128,2)]),
}
what, *rest = sys.argv[1:]
job = rest[-1]
name, mode = job.split(":", 1)
device, config = torch.device("cuda"), ModelConfig.from_name(name)
if what == "compile":
    config = replace(config, n_layer=2)
with torch.inference_mode():
    torch.manual_seed(0)
    model = bench.random_model(config, mode, device, torch.bfloat16)
    layer = model.layers[0]; at = layer.attention
    kind = linear_triton.kind_of(at.wqkv.weight)
    dense = tuning.tables(device)[0].setdefault(tuning.key(kind, 1), {})
    moe = tuning.tables(device, "experts")[0].setdefault(tuning.key(kind, 1), {})
    parts = {"wo": at.wo, "wqkv": at.wqkv, "out": model.output}
    if layer.block_sparse_moe: parts |= {"up": layer.block_sparse_moe.cond_ffn.w13, "down": layer.block_sparse_moe.cond_ffn.w2}
    else: parts |= {"w13": layer.feed_forward.first if hasattr(layer.feed_forward, "first") else layer.feed_forward.w13, "w2": layer.feed_forward.w2}
    cases = {}
    for of, found in C[job].items():
        shape = parts[of].out_features, parts[of].in_features
        own = tuning.experts(kind, *shape, 1, 8, of == "down", device) if of in ("up", "down") else tuning.configuration(kind, *shape, 1, device)
        cases[of] = shape, list(dict.fromkeys([own, *(Configuration(*c) for c in found)]))
    def step(chosen):
        a = {cases[of][0]: how for of, how in chosen.items() if of not in ("up", "down")}
        b = {cases[of][0]: how for of, how in chosen.items() if of in ("up", "down")}
        with patch.dict(dense, a), patch.dict(moe, b):
            return bench.step_time(model, 1, 205) * 1e6
    if what == "compile":
        first, count = map(int, rest[:2])
        for of, how in [(of, how) for of, (_, found) in cases.items() for how in found][first::count]:
            try: step({of: how})
            except Exception as e: print("failed", of, how, repr(e)[:200])
        sys.exit()
    best = start = min(step({}), step({}))
    chosen = {}
    for of, (_, found) in cases.items():
        times = {}
        for how in found:
            try: times[how] = step(chosen | {of: how})
            except Exception as e: print("failed", of, how, repr(e)[:200])
        order = sorted(times, key=times.get)
        print(job, of, [(tuple(vars(how).values()), round(times[how], 1)) for how in order[:4]], "own", round(times[found[0]], 1), flush=True)
        if times[order[0]] < best * 0.9985 and (us := step(chosen | {of: order[0]})) < best * 0.9985:
            best, chosen = us, chosen | {of: order[0]}
    print(job, f"BEST {start:.1f} -> {best:.1f} us", {of: (cases[of][0], tuple(vars(how).values())) for of, how in chosen.items()}, flush=True)
    if rest[0] == "apply" and chosen:
        path = tree + "/ops/tuned/h200.json"; table = json.load(open(path))
        for of, how in chosen.items():
            (N, K), rows = cases[of][0], table["experts" if of in ("up", "down") else "linear"]
            rows[:] = [r for r in rows if (r["kind"], r["max_rows"], r["N"], r["K"]) != (kind, 1, N, K)]
            rows.insert(0, {"kind": kind, "max_rows": 1, "N": N, "K": K, **vars(how)})
        json.dump(table, open(path, "w"))
