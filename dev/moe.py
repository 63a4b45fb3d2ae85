# ruff: noqa
import os, sys
tree = os.environ.get("TREE", os.getcwd()); sys.path[:0] = [tree, tree + "/scripts"]
ROWS = int(os.environ.get("ROWS", 1))  # of a prompt
from dataclasses import replace
from unittest.mock import patch
import bench, ops, torch
from measure import weight_bytes
from model import ModelConfig
from ops import linear_triton, tuning
from ops.tuning import Configuration
C = {"int4": dict(  # of 5 rows
  up=[(32,2,4,168,0),(32,1,4,240,0),(16,2,4,128,0),(16,1,4,128,0),(16,2,8,128,0),(32,1,8,168,0),(32,2,4,168,3),(32,1,4,168,3)],
  down=[(16,1,8,128,2),(16,2,4,168,0),(32,1,8,168,1),(16,1,16,128,1),(16,2,16,128,1),(16,2,8,168,0),(16,1,8,128,0)],
  wo=[(16,2,16,128,1),(16,1,16,128,1),(16,2,8,168,0)], wqkv=[(32,1,8,128,0),(16,1,8,128,0),(16,2,8,128,0),(32,1,4,168,0)])}
def step_time(model, rows, length):
    """bench.step_time, of tokens that meet different experts."""
    tokens = torch.randint(0, 1024, (1, rows), generator=torch.Generator().manual_seed(0)).cuda()
    with patch.object(torch, "ones", lambda *_, **__: tokens):
        return bench.step_time(model, rows, length)
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
    dense = tuning.tables(device)[0].setdefault(tuning.key(kind, ROWS), {})
    moe = tuning.tables(device, "experts")[0].setdefault(tuning.key(kind, ROWS), {})
    k = config.num_activated_experts if hasattr(config, "num_activated_experts") else 8
    cases = {}
    for of, linear in (("up", ff.w13), ("down", ff.w2), ("wo", at.wo), ("wqkv", at.wqkv)):
        shape = linear.out_features, linear.in_features
        own = tuning.experts(kind, *shape, ROWS, min(8 * ROWS, 128), of == "down", device) if of in ("up", "down") else tuning.configuration(kind, *shape, ROWS, device)
        cases[of] = shape, list(dict.fromkeys([own, *(Configuration(*c) for c in C[mode][of])]))
    def step(chosen):
        a = {cases[of][0]: how for of, how in chosen.items() if of in ("wo", "wqkv")}
        b = {cases[of][0]: how for of, how in chosen.items() if of in ("up", "down")}
        with patch.dict(dense, a), patch.dict(moe, b):
            return step_time(model, ROWS, 400 if ROWS == 1 else 40) * 1e6
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
            for how in found if turn == 0 else ranked[of][:2]:
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
