# ruff: noqa
import os, sys
sys.path[:0] = [os.getcwd(), os.getcwd() + "/scripts"]
from dataclasses import replace
from unittest.mock import patch
import bench, ops, torch
from measure import weight_bytes
from model import ModelConfig
from ops import linear_triton, tuning
from ops.tuning import Configuration
C = {
 "int4": dict(
  up=[(32,4,4,168,3),(32,2,4,112,0),(32,2,4,96,0),(64,4,4,240,2),(32,4,4,160,0)],
  down=[(16,1,16,120,1),(16,2,16,128,1),(32,1,16,128,1),(16,2,8,200,1)], wo=[(32,4,8,240,1)],
  wqkv=[(32,1,8,112,0),(32,1,8,96,0),(32,2,8,120,0)]),
 "int8": dict(
  up=[(32,4,8,240,1),(64,2,8,240,1),(32,4,8,128,2),(32,4,8,128,0),(16,4,8,128,2),(32,2,8,128,2),(32,2,8,120,0),(16,2,8,96,0),(32,4,4,128,0),(16,4,8,128,0),(32,2,16,120,1),(16,4,4,128,0),(64,2,8,128,2),(32,2,4,160,0)],
  down=[(16,4,16,120,1),(16,4,8,128,2),(16,2,16,128,1),(16,2,8,120,2),(32,4,8,240,1),(16,2,8,120,0),(16,4,4,160,0)],
  wo=[(16,8,8,128,2),(16,8,8,128,0),(16,4,16,120,1),(16,4,8,128,2),(16,2,16,128,1),(16,2,8,96,2),(32,4,16,120,1),(16,4,4,128,0)],
  wqkv=[(32,4,8,240,1),(16,4,8,128,2),(16,4,8,128,0),(32,2,16,120,1),(16,2,16,120,1),(16,2,8,96,2),(16,2,8,96,0),(16,4,4,128,0),(32,2,4,128,0),(32,4,8,128,0)]),
 "bf16": dict(
  up=[(16,8,16,120,1),(16,4,8,128,2),(32,4,8,128,2),(32,8,8,240,1),(16,8,8,128,0),(32,4,4,200,2),(16,4,16,120,1),(32,4,16,120,1)],
  down=[(16,8,8,128,2),(16,8,16,120,1),(16,4,8,128,2),(16,4,8,128,0),(16,8,8,240,1),(32,4,16,120,1)],
  wo=[(16,8,16,120,1),(16,4,16,120,1),(16,4,8,128,2),(32,8,8,240,1),(16,8,8,240,1),(16,4,8,128,0)],
  wqkv=[(32,8,8,240,1),(16,4,16,120,1),(16,4,8,128,0),(16,4,8,128,2),(32,4,16,120,1),(16,8,16,120,1),(16,8,8,128,0),(32,4,8,128,2),(16,2,8,128,2)]),
}
what, job, *rest = sys.argv[1:]
name, mode = job.split(":", 1)
device, config = torch.device("cuda"), ModelConfig.from_name(name)
if what == "compile":
    config = replace(config, n_layer=2)
with torch.inference_mode():
    model = bench.random_model(config, mode, device, torch.bfloat16)
    layer = model.layers[0]
    at, ff = layer.attention, layer.block_sparse_moe.cond_ffn
    kind = linear_triton.kind_of(at.wqkv.weight)
    dense = tuning.tables(device)[0].setdefault(tuning.key(kind, 1), {})
    moe = tuning.tables(device, "experts")[0].setdefault(tuning.key(kind, 1), {})
    k = config.num_activated_experts if hasattr(config, "num_activated_experts") else 8
    cases = {}
    for of, linear in (("up", ff.w13), ("down", ff.w2), ("wo", at.wo), ("wqkv", at.wqkv)):
        shape = linear.out_features, linear.in_features
        own = tuning.experts(kind, *shape, 1, 8, of == "down", device) if of in ("up", "down") else tuning.configuration(kind, *shape, 1, device)
        cases[of] = shape, list(dict.fromkeys([own, *(Configuration(*c) for c in C[mode][of])]))
    def step(chosen):
        a = {cases[of][0]: how for of, how in chosen.items() if of in ("wo", "wqkv")}
        b = {cases[of][0]: how for of, how in chosen.items() if of in ("up", "down")}
        with patch.dict(dense, a), patch.dict(moe, b):
            return bench.step_time(model, 1, 400) * 1e6
    if what == "compile":
        first, count = map(int, rest)
        for of, how in [(of, how) for of, (_, found) in cases.items() for how in found][first::count]:
            try:
                step({of: how})
            except Exception as e:
                print("failed", of, how, repr(e)[:200])
        sys.exit()
    limit = weight_bytes(model, 1) / ops.read_bandwidth(device) * 1e6
    best = start = step({})
    chosen = {}
    for turn in range(2):
        for of, (_, found) in cases.items():
            times = {}
            for how in found if turn == 0 else ranked[of][:4]:
                try:
                    times[how] = step(chosen | {of: how})
                except Exception as e:
                    print("failed", of, how, repr(e)[:200])
            order = sorted(times, key=times.get)
            if turn == 0:
                ranked = (ranked if of != "up" else {}) | {of: order}
            for how in order:
                print(job, of, tuple(vars(how).values()), f"{times[how]:.0f}", flush=True)
            if times[order[0]] < best * 0.9985 and (us := step(chosen | {of: order[0]})) < best * 0.9985:
                best, chosen = us, chosen | {of: order[0]}
    found = {of: tuple(vars(how).values()) for of, how in chosen.items()}
    print(job, f"BEST {start:.0f} -> {best:.0f} us, {limit / start:.3f} -> {limit / best:.3f}", found, flush=True)
