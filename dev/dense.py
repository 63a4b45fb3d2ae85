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
UP = {"int8": [(32, 2, 4, 160, 0), (32, 2, 4, 128, 0), (16, 2, 4, 96, 0), (16, 2, 4, 112, 0), (32, 1, 4, 128, 0), (16, 2, 8, 96, 0), (16, 4, 8, 128, 2), (32, 2, 8, 128, 0)],
 "int4": [(32, 1, 4, 128, 0), (32, 1, 4, 168, 0), (64, 1, 4, 168, 3), (64, 1, 4, 200, 2), (32, 2, 4, 128, 0), (32, 2, 8, 128, 0), (32, 1, 8, 128, 2), (32, 1, 4, 104, 0), (32, 1, 8, 128, 0)],
 "bf16": [(16, 4, 8, 128, 2), (16, 8, 8, 128, 2), (32, 8, 8, 240, 1), (32, 4, 8, 128, 2), (32, 4, 4, 200, 2)]}
DOWN = {"int8": [(32, 2, 16, 120, 1), (32, 4, 8, 240, 1), (16, 4, 8, 128, 2)],
 "int4": [(32, 1, 16, 128, 1), (16, 1, 8, 120, 2), (32, 4, 8, 240, 1), (16, 2, 16, 128, 1)],
 "bf16": [(16, 8, 8, 128, 2), (16, 8, 8, 240, 1)]}
what, job, *rest = sys.argv[1:]
name, mode = job.split(":", 1)
device, config = torch.device("cuda"), ModelConfig.from_name(name)
if what == "compile":
    config = replace(config, n_layer=2)
with torch.inference_mode():
    model = bench.random_model(config, mode, device, torch.bfloat16)
    layer = model.layers[0]
    layers = {"wo": layer.attention.wo, "w2": layer.feed_forward.w2, "wqkv": layer.attention.wqkv}
    layers["w13"] = layer.feed_forward.w13
    kind = linear_triton.kind_of(layers["w13"].weight)
    table = tuning.tables(device)[0].setdefault(tuning.key(kind, 1), {})
    cases = {}
    for of, linear in layers.items():
        shape = linear.out_features, linear.in_features
        own = tuning.configuration(kind, *shape, 1, device)
        found = [own]
        for c in (DOWN if of in ("wo", "w2") else UP)[mode]:
            c = Configuration(*c)
            if c != own:
                step = c.k_repeat * c.num_warps * tuning.CHUNK[kind]
                found.append(c)
        cases[of] = shape, list(dict.fromkeys(found))
    def step(chosen):
        with patch.dict(table, {cases[of][0]: how for of, how in chosen.items()}):
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
    for of, (_, found) in cases.items():
        times = {}
        for how in found:
            try:
                times[how] = step(chosen | {of: how})
            except Exception as e:
                print("failed", of, how, repr(e)[:200])
        for how, us in sorted(times.items(), key=lambda item: item[1])[:4]:
            print(job, of, tuple(vars(how).values()), f"{us:.0f}", flush=True)
        how = min(times, key=times.get)
        if times[how] < best * 0.9985 and (us := step(chosen | {of: how})) < best * 0.9985:
            best, chosen = us, chosen | {of: how}
    found = {of: tuple(vars(how).values()) for of, how in chosen.items()}
    print(job, f"BEST {start:.0f} -> {best:.0f} us, {limit / start:.3f} -> {limit / best:.3f}", found, flush=True)
