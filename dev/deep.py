# ruff: noqa
"""Steps of one row with one or two steps of weights on their way, the best of each layer in turn.

python dev/deep.py compile MODEL:MODE I N     compile every N-th case from I on, in a process of its own
python dev/deep.py run MODEL:MODE
"""

import os
import sys

sys.path[:0] = [os.getcwd(), os.getcwd() + "/scripts"]
from dataclasses import replace
from unittest.mock import patch

import bench
import ops
import torch
from measure import weight_bytes
from model import ModelConfig
from ops import linear_triton, tuning
from ops.tuning import Configuration

INT8 = [
    (16, 2, 4, 96, 0),
    (16, 2, 4, 112, 0),
    (32, 1, 4, 128, 0),
    (32, 2, 4, 160, 0),
    (16, 1, 4, 80, 0),
    (16, 2, 8, 96, 2),
]
INT8_DOWN = [(16, 2, 8, 96, 2), (16, 2, 8, 120, 2), (32, 1, 16, 128, 1), (16, 2, 4, 96, 0), (32, 2, 8, 240, 1)]
INT4 = [(32, 1, 4, 128, 0), (16, 1, 4, 96, 0), (16, 1, 8, 80, 0), (16, 2, 4, 128, 0), (64, 1, 4, 168, 3)]
INT4_DOWN = [(32, 1, 16, 128, 1), (32, 1, 8, 200, 1), (16, 1, 16, 64, 2), (16, 1, 8, 120, 2), (16, 2, 8, 128, 2)]
BF16 = [(16, 4, 8, 128, 2), (16, 4, 16, 120, 1), (16, 2, 8, 96, 2), (16, 2, 4, 96, 0), (16, 8, 8, 128, 2)]
CASES = {"int8": (INT8, INT8_DOWN), "int4": (INT4, INT4_DOWN), "bf16": (BF16, BF16)}

what, job, *rest = sys.argv[1:]
name, mode = job.split(":", 1)
device, config = torch.device("cuda"), ModelConfig.from_name(name)
if what == "compile":
    config = replace(config, n_layer=2)
with torch.inference_mode():
    model = bench.random_model(config, mode, device, torch.bfloat16)
    layer = model.layers[0]
    up, down = CASES[mode]
    layers = {"wo": layer.attention.wo, "w2": layer.feed_forward.w2, "wqkv": layer.attention.wqkv}
    layers["w13"] = layer.feed_forward.w13
    kind = linear_triton.kind_of(layers["w13"].weight)
    table = tuning.tables(device)[0].setdefault(tuning.key(kind, 1), {})
    cases = {}  # shape and configurations of each layer
    for of, linear in layers.items():
        shape = linear.out_features, linear.in_features
        own = tuning.configuration(kind, *shape, 1, device)
        tried = [own, *(Configuration(*c) for c in (down if of in ("wo", "w2") else up))]
        cases[of] = shape, [replace(how, stages=n) for how in dict.fromkeys(tried) for n in (1, 2)]

    def step(chosen: dict) -> float:
        with patch.dict(table, {cases[of][0]: how for of, how in chosen.items()}):
            return bench.step_time(model, 1, 400) * 1e6

    if what == "compile":
        first, count = map(int, rest)
        for of, how in [(of, how) for of, (_, found) in cases.items() for how in found][first::count]:
            step({of: how})
        sys.exit()
    limit = weight_bytes(model, 1) / ops.read_bandwidth(device) * 1e6
    best = start = step({})
    chosen = {}
    for of, (_, found) in cases.items():
        times = {how: step(chosen | {of: how}) for how in found}
        for how, us in sorted(times.items(), key=lambda item: item[1]):
            print(job, of, tuple(vars(how).values()), f"{us:.0f}", flush=True)
        how = min(times, key=times.get)
        if times[how] < best * 0.9985 and (us := step(chosen | {of: how})) < best * 0.9985:
            best, chosen = us, chosen | {of: how}
    found = {of: tuple(vars(how).values()) for of, how in chosen.items()}
    print(job, f"{start:.0f} -> {best:.0f} us, {limit / start:.3f} -> {limit / best:.3f}", found, flush=True)
